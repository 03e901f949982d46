"""Commands and code of the project's Markdown files, as their tests need them."""

import dataclasses
import re
import subprocess
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PROGRAMS = "aws|export|gsa|make|pip|python|python3|ray|source|subnet\\(\\)|kubectl|docker"
SHELL = ("", "sh", "bash", "shell")  # languages of blocks that are commands


@dataclasses.dataclass(frozen=True)
class Found:
    """A command, or a block in another language than the shell's."""

    file: str
    language: str  # of a block; `sh` for a command
    text: str  # without comments; a command on one line


def files() -> list[Path]:
    """Every Markdown file of the project."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split()]


def found_in(path: Path) -> list[Found]:
    """All that a reader may copy: blocks, and commands within sentences and tables."""
    name, found = str(path.relative_to(ROOT)), []
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info in SHELL:
            found += [Found(name, "sh", line) for line in commands(token.content)]
        elif token.type == "fence" and token.info != "text":
            found.append(Found(name, token.info, token.content))
        for child in token.children or []:
            if child.type == "code_inline" and re.match(rf"({PROGRAMS}) ", child.content):
                found.append(Found(name, "sh", child.content))
    return found


def commands(block: str) -> list[str]:
    """The command lines of a shell block, continued lines joined, without the comments behind them."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [text for line in lines if (text := re.sub(r"(^|\s\s+)#.*", "", line).strip())]


def text_of(path: Path) -> str:
    """A file with each run of blanks as one, to find sentences in."""
    return " ".join(path.read_text(encoding="utf-8").split())
