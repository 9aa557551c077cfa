"""Hooks of mkdocs: write the parts of the pages that come from the package, and add the files that pages link to.

A page asks for a part with `<!-- generated: NAME -->`, NAME being a function of `PARTS`. So the lists of commands,
networks and recipes are made anew at each build. A link to a file outside `docs/` becomes a link to a copy of it in the
site.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COUNT, RANGE = 2**31 - 1, re.compile(r"(?P<least>\d+)<=x<=(?P<most>\d+)")
LINK = re.compile(r"(?<=\]\()(?:\.\./)+(?!\.\./)(?P<path>[\w./-]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository, outside docs/, that a page links to."""
    for page in files.documentation_pages():
        for path in _linked(Path(page.abs_src_path)):
            name = f"repository/{path}"
            if not files.get_file_from_path(name) and (ROOT / path).is_file():
                content = (ROOT / path).read_bytes()
                if path.endswith(".md"):
                    content = _without_links(content.decode())
                files.append(File.generated(config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is generated, and point links to files of the repository at their copies."""
    if page.file.src_uri.startswith("repository/"):
        return markdown
    up = "../" * page.file.src_uri.count("/")
    markdown = LINK.sub(lambda match: f"{up}repository/{match['path']}", markdown)
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: PARTS[match[1]](), markdown)


def _linked(page: Path) -> Iterator[str]:
    for match in LINK.finditer(page.read_text()):
        yield match["path"]


def _without_links(markdown: str) -> str:
    """The page without its relative links: most of what they name is not in the site."""
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", markdown)


def commands() -> str:
    """Every command of `fastroute` with its arguments and options."""
    from fastroute.cli import app

    root = typer.main.get_command(app)
    return "\n\n".join(_command(path, command) for path, command in _walk(root, "fastroute"))


def _walk(command, path: str) -> Iterator[tuple[str, object]]:
    yield path, command
    commands = getattr(command, "commands", {})
    for name in commands:
        yield from _walk(commands[name], f"{path} {name}")  # the item, which is imported when it is asked for


def _command(path: str, command) -> str:
    context = command.context_class(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}", (command.help or "").strip(), f"```text\n{usage}\n```"]
    shown = [parameter for parameter in command.params if parameter.get_help_record(context)]
    panels = dict.fromkeys(getattr(parameter, "rich_help_panel", None) for parameter in shown)
    for panel in panels:
        parts += [f"**{panel}**"] if panel else []
        rows = (_row(p, context) for p in shown if getattr(p, "rich_help_panel", None) == panel)
        parts.append("\n".join(["| | | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(parameter, context) -> str:
    """The name with its type, the words of its help, and the default, range and "required" that typer adds to these."""
    name, words = parameter.get_help_record(context)
    added = re.search(r"\s*\[([^]]+(?:\[[^]]*\][^]]*)*)\]$", words)
    facts = [added[1]] if added else []
    words = words[: added.start()] if added else words
    if said := re.search(r"\s*\(default: (.+)\)$", words):
        words, facts = words[: said.start()], [f"default: {said[1]}", *facts]
    name, facts = name.replace("int range", "int"), RANGE.sub(_bounds, "; ".join(facts))
    return f"| `{name}` | {_cell(words)} | {_cell(facts)} |"


def _bounds(match: re.Match) -> str:
    least, most = match["least"], int(match["most"])
    return f"{least} to {most:,}" if most < COUNT else f"at least {least}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def networks() -> str:
    """Every network with its parameters, the thesis's beside them, and its multiply-accumulates."""
    from fastroute import models

    lines = ["| network | parameters | thesis, M | MACs, M | table |", "|---|---:|---:|---:|---|"]
    with torch.device("meta"):
        for name in models.list_models():
            info, model = models.model_info(name), models.create_model(name)
            count = sum(parameter.numel() for parameter in model.parameters())
            macs = models.count_macs(model, (3, info.img_size, info.img_size)) / 1e6
            link = f"[`{name}`](api/models.md#fastroute.models.{name})"
            lines.append(f"| {link} | {count:,} | {info.params} | {macs:,.1f} | {info.table} |")
    return "\n".join(lines)


def recipes() -> str:
    """Every recipe, by experiment, with the percentages that the thesis reports and the options that it sets."""
    from fastroute.training.recipes import VARIANTS
    from fastroute.training.recipes import recipes as known

    lines = []
    for command, (_, varied) in VARIANTS.items():
        lines += [f"## For `fastroute {command}`", ""]
        for about, found in groupby(known(command).values(), key=lambda recipe: recipe.about):
            found = list(found)
            measures = list(dict.fromkeys(measure for recipe in found for measure in recipe.reported))
            options = {name: value for name, value in found[0].options.items() if name != varied}
            said = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in options.items())
            lines += [f"**{about}**", "", f"{said}", ""]
            lines += [f"| recipe {'| ' + ' | '.join(f'{m}, %' for m in measures) if measures else ''} |"]
            lines += ["|---|" + "---:|" * len(measures)]
            for recipe in found:
                values = (recipe.reported.get(measure) for measure in measures)
                cells = [f"`{recipe.name}`", *("" if value is None else f"{value:.2f}" for value in values)]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def methods() -> str:
    """Every method of `fastroute cluster`, and which options it takes."""
    from fastroute._methods import METHODS

    lines = ["| `--method` | | `--heads`, `--n-init` | `--self-label` |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        marks = ("yes" if able else "" for able in (method.starts, method.scores))
        lines.append(f"| `{name}` | {method.about} | {' | '.join(marks)} |")
    return "\n".join(lines)


PARTS = {part.__name__: part for part in (commands, networks, recipes, methods)}
