"""README's commands are real: each script exists, each option stands in its --help, each link leads somewhere."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The words of each command line in README's code blocks and inline code that runs a script of the project."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    inline = re.findall(r"`([^`\n]*?(?:ldm|tools|launch|tests)/\w+\.(?:py|sh)[^`\n]*)`", README)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline
    return [
        shlex.split(line, comments=True) for line in lines if re.search(r"(ldm|tools|launch|tests)/\w+\.(py|sh)", line)
    ]


def script_of(words: list[str]) -> str | None:
    return next((word for word in words if re.fullmatch(r"(ldm|tools|launch|tests)/\w+\.(py|sh)", word)), None)


def test_readme_has_the_two_commands():
    assert ["bash", "launch/quickstart.sh"] in commands()
    assert ["bash", "tests/run.sh"] in commands()


SCRIPTS = sorted({script for words in commands() if (script := script_of(words))})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_exists_and_every_option_is_in_its_help(script):
    assert (ROOT / script).is_file()
    used = set()
    for words in commands():
        if script_of(words) == script:
            used |= {word.split("=")[0] for word in words[words.index(script) + 1 :] if re.match(r"--\w", word)}
    if not used:
        return
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"--[\w.]+", done.stdout))
    assert used <= listed, f"{script} has no {sorted(used - listed)}"


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"^[A-Z_]+$", README, re.M) == []


def test_every_link_into_the_repository_leads_to_a_file():
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith(("http", "#"))]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_every_source_file_is_in_the_tree_of_the_house():
    tree = README.split("## The house")[1]
    names = [p.name for folder in ("ldm", "tools") for p in (ROOT / folder).rglob("*.py") if p.name != "__init__.py"]
    assert [name for name in sorted(names) if name not in tree] == []
