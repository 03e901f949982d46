"""Which commit this code is."""

import os
import subprocess
from pathlib import Path

import gsa

PATIENCE = 10.0  # seconds that git may take


def git_tags(code: Path = Path(gsa.__file__)) -> dict[str, str]:
    """The commit of this code, as MLflow's own tag.

    Nothing where the commit is not known: there is no git, the code is not in a repository (installed from a wheel, it
    may lie inside somebody else's), or git does not trust the repository's owner.
    """
    # a hook's GIT_DIR names the hook's repository
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(code.parent)]
    try:
        for arguments in (["ls-files", "--error-unmatch", code.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, check=True, env=environment, timeout=PATIENCE
            )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": done.stdout.strip()}
