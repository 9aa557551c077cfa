"""Write tables of the documentation: `python -m benchmarks.write_tables RESULT.json [--topic steps] [--page FILE]`."""

import argparse
from pathlib import Path

from fastroute._files import write_text
from fastroute.bench import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="a result of `fastroute bench`, of --stated or --steps")
    parser.add_argument("--topic", choices=report.SECTIONS, default="speed", help="the section")
    page = Path("docs/benchmarks.md")
    parser.add_argument("--page", type=Path, default=page, help="the page whose marked section is written")
    options = parser.parse_args()
    try:
        write_text(options.page, report.rewrite_page(options.page, options.result, options.topic))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
