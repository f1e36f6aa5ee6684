"""This program's checkpoints as sources of a run's parts: found from a run's folder, verified before they are loaded.

Enters: a source of the config, and the folders of a pipeline that are to be loaded of it. Leaves: the source to load
from; or an error that names the file which is not as it was written.
"""

from pathlib import Path

from ldm.models.pretrained import INDEX_NAME
from ldm.training.checkpoint import HASHES, STATE, CheckpointError, find_checkpoint, verify_checkpoint


def checked_source(source: str, *folders: str) -> str:
    """The source to load from: of a run's folder, or its checkpoints/, the latest checkpoint; others as they are.

    Of a checkpoint of this program the files in `folders` (names of files beside them count too) and in the folder that
    the source itself names are verified. Of other sources nothing is looked at.

    Raises:
        CheckpointError: a run's folder without a checkpoint, or a checkpoint that is incomplete or altered; names the
            file.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return source
    if path.is_dir():
        try:
            found = find_checkpoint(path)
        except CheckpointError:
            if (path / "checkpoints").is_dir():
                raise
        else:
            if found != path:
                path = found.resolve()  # `latest` becomes the step that it points to, for all that is read of it
                source = str(path)
    inside = own_checkpoint(path)
    if inside is not None:
        root, part = inside
        verify_checkpoint(root, {*folders, part} - {""})
    return source


def own_checkpoint(path: Path) -> tuple[Path, str] | None:
    """The checkpoint of this program that a path is, or lies in, and its folder there ("": itself); None: in none."""
    path = path.parent.resolve() / path.name if path.is_file() else path.resolve()
    for root in (path, *path.parents[:2]):
        listed, whole = (root / HASHES).is_file(), (root / INDEX_NAME).is_file()
        if (listed and (whole or (root / STATE).is_dir())) or (whole and (root / STATE).is_dir()):
            return root, "" if root == path else path.relative_to(root).parts[0]
    return None
