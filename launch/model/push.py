"""sparse-train push: upload a model folder, with a model card, to the hub."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train import artifacts
from sparse_train.errors import UserError

_CARD = "README.md"
_OF_THIS_MACHINE = (artifacts.MANIFEST, artifacts.SOURCES)  # they name hosts and paths


def add_push(commands: "argparse._SubParsersAction[Any]") -> None:
    push = commands.add_parser("push", help="upload a model folder, with a model card, to the hub")
    push.add_argument("folder", metavar="FOLDER", type=Path, help="a model folder of this machine")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME; it is made where there is none")
    push.add_argument("--private", action="store_true", help="make REPO private")
    push.add_argument("--dry-run", action="store_true", help="only show the card and which files would be uploaded")
    push.set_defaults(command=_push)


def _push(options: argparse.Namespace, console: Console) -> None:
    folder, repo = options.folder, options.repo
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")

    from sparse_train import hub
    from sparse_train.launch.model.card import TAG, make_card
    from sparse_train.sparse.header import READ

    if not hub.may_be_hub_name(repo) or "/" not in repo:
        raise UserError(f"{repo} is not a name on the hub; give OWNER/NAME")
    _require_undamaged(folder)
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in READ and path.name not in _OF_THIS_MACHINE}
    num_bytes = sum(path.stat().st_size for path in files.values() if isinstance(path, Path))
    own = folder / _CARD
    card = own.read_bytes() if own.is_file() else str(make_card(folder, repo)).encode()
    if options.dry_run:
        console.out(card.decode(errors="replace"), f"{_CARD}, which is the text above, and {len(files)} files, "
                    f"{num_bytes / 1e6:.1f} MB, would be uploaded to {repo}:", *files, sep="\n", highlight=False)
    else:
        url = hub.push(repo, {_CARD: card, **files}, TAG, options.private)
        console.out(f"{url}: {_CARD} and {len(files)} files, {num_bytes / 1e6:.1f} MB", highlight=False)


def _require_undamaged(folder: Path) -> None:
    """Raises UserError where a file is not the one that was signed."""
    made = artifacts.stage_of(folder)
    if artifacts.read_manifest(folder) is not None:
        damage = artifacts.damage(folder)
    elif made is not None:  # compress/dense has no manifest of its own
        damage = artifacts.damage(made[0], lambda names: [name for name in names
                                                          if Path(name).parts[0] == folder.name])
    else:
        return
    if damage:
        raise UserError(f"{damage}; run what made {folder} again")
