"""Draw how a call travels, on light and on dark paper: `python docs/assets/draw_call.py`."""

from pathlib import Path

THEMES = {"light": ("#1f2328", "#f6f8fa", "#0969da"), "dark": ("#e6edf3", "#21262d", "#58a6ff")}  # ink, box, accent

# Boxes: x, y, width, lines; the first line is the name, the others say what happens there.
BOXES = {
    "python": (250, 10, 320, ("fastroute.ops.cross_connect(xs, …)", "fastroute/ops: makes lists, names options")),
    "func": (610, 10, 200, ("torch.func, forward mode", "plain PyTorch")),
    "eager": (110, 110, 280, ("eager: autograd", "csrc/ops/cross_connect.cpp", "records the hand-derived backward")),
    "compiled": (
        430,
        110,
        280,
        ("torch.compile: the graph", "fake kernels give shapes and layouts;", "one node, called as it runs"),
    ),
    "choice": (
        250,
        225,
        320,
        ("checks and choice", "csrc/paths.h, csrc/ops/route.cpp", "use_backend, FASTROUTE_BACKEND go first"),
    ),
    "cpu": (10, 350, 185, ("native, CPU", "csrc/cpu", "AVX2, AVX-512,", "AVX-512 with bfloat16")),
    "cuda": (215, 350, 185, ("native, CUDA", "csrc/cuda", "two passes, or clusters", "of multiprocessors")),
    "triton": (420, 350, 185, ("Triton", "backends/triton", "recorded once, launched", "again by csrc/triton")),
    "reference": (625, 350, 185, ("reference", "backends/reference", "plain PyTorch:", "the specification")),
}
ARROWS = [  # from, to, and for whom; drawn below the box
    ("python", "eager", ""),
    ("python", "compiled", ""),
    ("eager", "choice", ""),
    ("compiled", "choice", ""),
    ("choice", "cpu", "CPU"),
    ("choice", "cuda", "GPU, by size"),
    ("choice", "triton", "GPU, by size"),
    ("choice", "reference", "nobody else"),
]
LINE = 17


def height(name: str) -> int:
    return 14 + LINE * len(BOXES[name][3])


def box(name: str, ink: str, paper: str) -> str:
    x, y, width, lines = BOXES[name]
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height(name)}" rx="6" fill="{paper}" stroke="{ink}" stroke-opacity="0.4"/>'
    ]
    for i, line in enumerate(lines):
        weight = ' font-weight="600"' if i == 0 else ' fill-opacity="0.75"'
        parts.append(
            f'<text x="{x + width / 2}" y="{y + 21 + LINE * i}" text-anchor="middle" fill="{ink}"{weight}>{line}</text>'
        )
    return "\n".join(parts)


def arrow(start: str, end: str, accent: str) -> str:
    (x0, y0, w0, _), (x1, y1, w1, _) = BOXES[start], BOXES[end]
    # Arrows leave a box spread along its lower edge, in the direction that they go.
    centre, target = x0 + w0 / 2, x1 + w1 / 2
    begin = min(max(centre + (target - centre) * 0.35, x0 + 20), x0 + w0 - 20)
    finish = min(max(target + (centre - target) * 0.15, x1 + 20), x1 + w1 - 20)
    return (
        f'<line x1="{begin}" y1="{y0 + height(start)}" x2="{finish}" y2="{y1 - 3}" stroke="{accent}" '
        'stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def drawing(ink: str, paper: str, accent: str) -> str:
    tip = f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{accent}"/></marker>'
    labels = "".join(
        f'<text x="{BOXES[end][0] + BOXES[end][2] / 2}" y="{BOXES[end][1] + height(end) + 18}" text-anchor="middle" fill="{accent}">{words}</text>\n'
        for _, end, words in ARROWS
        if words
    )
    side = f'<line x1="570" y1="34" x2="606" y2="34" stroke="{accent}" stroke-width="1.5" marker-end="url(#tip)"/>'
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 465" font-family="system-ui, sans-serif" font-size="13">',
            f"<defs>{tip}</defs>",
            *(arrow(start, end, accent) for start, end, _ in ARROWS),
            side,
            *(box(name, ink, paper) for name in BOXES),
            labels + "</svg>\n",
        ]
    )


if __name__ == "__main__":
    for theme, colours in THEMES.items():
        (Path(__file__).parent / f"call-{theme}.svg").write_text(drawing(*colours), encoding="utf-8")
