"""Files are found as by glob, each once however many links lead to it, and links in a circle end."""

import glob
import os
from pathlib import Path

import pytest

from gsa.data.corpus import CorpusConfig, documents, survey
from gsa.data.files import find_files, unique
from gsa.errors import ConfigError
from tests.draw import Draw

PATTERNS = [
    "**/*.txt",
    "*.txt",
    "**",
    "*/**",
    "**/b/*",
    "**/b/**/*.txt",
    "a/../*/?.txt",
    "[ab]/*",
    "**/.h/*",
    "**x",
    "*/",
]


def found(*patterns: str, folder: Path) -> list[str]:
    """The files that patterns in a folder name, relative to it."""
    files = find_files([os.path.join(folder, pattern) for pattern in patterns])
    return [os.path.relpath(file.path, folder) for file in files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path in ("a/1.txt", "b/2.txt", "c.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"text of {path}\n")
    return tmp_path


def test_without_links_the_files_are_those_of_glob(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    for _ in range(40):
        parts = draw.random.choices(["a", "b", "ab", "x", ".h", "[b]"], k=draw.random.randint(0, 3))
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / draw.random.choice(["1.txt", "2.txt", ".3.txt", "4.md"])).touch()
    monkeypatch.chdir(tmp_path)
    for pattern in (*PATTERNS, *(f"{tmp_path}/{pattern}" for pattern in PATTERNS)):
        expected = sorted({path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)})
        try:
            files = [str(file.path) for file in find_files([pattern])]
        except ConfigError:
            files = []
        assert files == expected, pattern


def test_links_to_folders_above_end_where_they_lead_back(tree: Path) -> None:
    """One such link made 123 documents of three; two never came to an end."""
    (tree / "a/up").symlink_to(tree)
    assert found("**/*.txt", folder=tree) == ["a/1.txt", "b/2.txt", "c.txt"]
    (tree / "b/up").symlink_to("..")
    (tree / "b/itself").symlink_to("../b")
    (tree / "a/nothing").symlink_to("nothing")
    assert found("**/*.txt", folder=tree) == ["a/1.txt", "b/2.txt", "c.txt"]
    assert found("**", folder=tree) == ["a/1.txt", "b/2.txt", "c.txt"]
    assert found("**/up/*.txt", folder=tree) == ["a/up/c.txt"]


def test_many_folders_that_all_link_to_each_other_are_searched_once(tmp_path: Path) -> None:
    folders = [tmp_path / f"{i:02}" for i in range(12)]  # 12! ways to go from one to another
    for folder in folders:
        folder.mkdir()
        (folder / "text.txt").write_text(folder.name)
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    assert len(found("**/*.txt", folder=tmp_path)) == 12


def test_a_link_to_a_folder_elsewhere_is_followed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "3.txt").write_text("more")
    (tree / "z").symlink_to(elsewhere)
    assert found("**/*.txt", folder=tree) == ["a/1.txt", "b/2.txt", "c.txt", "z/3.txt"]


def test_two_links_to_one_file_are_one_document(tree: Path) -> None:
    expected = [d.text for d in documents(CorpusConfig("text", [f"{tree}/**/*.txt"]))]
    before = survey(CorpusConfig("text", [f"{tree}/**/*.txt"]), tree / "memory")
    (tree / "b/symbolic.txt").symlink_to("2.txt")
    os.link(tree / "b/2.txt", tree / "b/9-hard.txt")
    (tree / "d").symlink_to("a")
    assert found("**/*.txt", folder=tree) == ["a/1.txt", "b/2.txt", "c.txt"]
    assert found("b/symbolic.txt", "**/*.txt", "./b/../b/2.txt", folder=tree) == ["b/symbolic.txt", "a/1.txt", "c.txt"]
    assert [d.text for d in documents(CorpusConfig("text", [f"{tree}/**/*.txt"]))] == expected
    assert survey(CorpusConfig("text", [f"{tree}/**/*.txt"]), tree / "memory") == before
    os.link(tree / "b/2.txt", tree / "a/0.txt")  # now the first
    assert found("**/*.txt", folder=tree) == ["a/0.txt", "a/1.txt", "c.txt"]
    assert unique([tree / "b/2.txt", tree / "c.txt", tree / "a/0.txt"]) == [tree / "a/0.txt", tree / "c.txt"]


def test_a_file_is_named_by_its_own_path_even_where_that_looks_like_a_glob(tree: Path) -> None:
    (tree / "a[1].txt").write_text("brackets")
    (tree / "a1.txt").write_text("none")
    assert found("a[1].txt", folder=tree) == ["a[1].txt"]
    files = find_files([f"{tree}/**/*.txt", f"{tree}/b/2.txt"])
    assert [file.path.name for file in files if file.named] == ["2.txt"]
    assert [file.path.name for file in files] == ["1.txt", "a1.txt", "a[1].txt", "2.txt", "c.txt"]


@pytest.mark.parametrize(
    "pattern", ["nowhere/*.txt", "a", "*/", "", "a\0b", "a" * 5000, "**/" + "a" * 5000, "**/no\0*"]
)
def test_a_path_that_names_no_file_is_refused(tree: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    with pytest.raises(ConfigError) as refused:
        find_files([pattern])
    assert (refused.value.key, refused.value.value) == ("data.corpus.files", pattern)
    assert refused.value.allowed == "no such file"
