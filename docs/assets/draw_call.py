"""Draw how a call travels, on light and on dark paper: `python docs/assets/draw_call.py`."""

from pathlib import Path

# Colours of text, boxes and arrows.
THEMES = {"light": ("#1f2328", "#f6f8fa", "#0969da"), "dark": ("#e6edf3", "#21262d", "#58a6ff")}
LINE = 17
"""Pixels from one line of a box to the next."""

# x, y and width; the name; what happens there.
BOXES = {
    "python": (250, 10, 320, "fastroute.ops.cross_connect(xs, …)", ["fastroute/ops: makes lists, names options"]),
    "func": (610, 10, 200, "torch.func, forward mode", ["plain PyTorch"]),
    "eager": (110, 110, 280, "eager: autograd", ["csrc/ops/cross_connect.cpp", "records the hand-derived backward"]),
    "compiled": (
        *(430, 110, 280),
        "torch.compile: the graph",
        ["fake kernels give shapes and layouts;", "one node, called as it runs"],
    ),
    "choice": (
        *(250, 225, 320),
        "checks and choice",
        ["csrc/paths.h, csrc/ops/route.cpp", "use_backend, FASTROUTE_BACKEND go first"],
    ),
    "cpu": (10, 350, 185, "native, CPU", ["csrc/cpu", "AVX2, AVX-512,", "AVX-512 with bfloat16"]),
    "cuda": (215, 350, 185, "native, CUDA", ["csrc/cuda", "two passes, or clusters", "of multiprocessors"]),
    "triton": (420, 350, 185, "Triton", ["backends/triton", "recorded once, launched", "again by csrc/triton"]),
    "reference": (625, 350, 185, "reference", ["backends/reference", "plain PyTorch:", "the specification"]),
}
ARROWS = ["python eager", "python compiled", "eager choice", "compiled choice"]
CHOICES = {"cpu": "CPU", "cuda": "GPU, by size", "triton": "GPU, by size", "reference": "nobody else"}


def height(name: str) -> int:
    return 31 + LINE * len(BOXES[name][4])


def text(x: float, y: float, words: str, colour: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" fill="{colour}"{style}>{words}</text>'


def line(x0: float, y0: float, x1: float, y1: float, colour: str) -> str:
    ends = f'x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)"/>'


def box(name: str, ink: str, paper: str) -> str:
    x, y, width, title, lines = BOXES[name]
    place = f'x="{x}" y="{y}" width="{width}" height="{height(name)}" rx="6"'
    parts = [f'<rect {place} fill="{paper}" stroke="{ink}" stroke-opacity="0.4"/>']
    parts.append(text(x + width / 2, y + 21, title, ink, ' font-weight="600"'))
    for i, words in enumerate(lines, start=1):
        parts.append(text(x + width / 2, y + 21 + LINE * i, words, ink, ' fill-opacity="0.75"'))
    return "\n".join(parts)


def arrow(start: str, end: str, colour: str) -> str:
    """Arrows leave a box spread along its lower edge, in the direction in which they go."""
    (x0, y0, w0, *_), (x1, y1, w1, *_) = BOXES[start], BOXES[end]
    centre, target = x0 + w0 / 2, x1 + w1 / 2
    begin = min(max(centre + (target - centre) * 0.35, x0 + 20), x0 + w0 - 20)
    finish = min(max(target + (centre - target) * 0.15, x1 + 20), x1 + w1 - 20)
    return line(begin, y0 + height(start), finish, y1 - 3, colour)


def drawing(ink: str, paper: str, accent: str) -> str:
    marker = 'id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 465" width="820" height="465"',
        ' font-family="system-ui, sans-serif" font-size="13">',
        f'<defs><marker {marker}><path d="M0 0 L8 4 L0 8 z" fill="{accent}"/></marker></defs>',
        *(arrow(*ends.split(), accent) for ends in ARROWS),
        *(arrow("choice", end, accent) for end in CHOICES),
        line(570, 34, 606, 34, accent),
        *(box(name, ink, paper) for name in BOXES),
    ]
    for name, words in CHOICES.items():
        x, y, width, *_ = BOXES[name]
        parts.append(text(x + width / 2, y + height(name) + 18, words, accent))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    for theme, colours in THEMES.items():
        (Path(__file__).parent / f"call-{theme}.svg").write_text(drawing(*colours), encoding="utf-8")
