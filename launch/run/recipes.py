"""The recipes that come with the package: in a checkout its configs/, installed sparse_train/configs."""

from importlib.resources import files
from pathlib import Path

from sparse_train.errors import UserError

CONFIGS = Path(str(files("sparse_train") / "configs"))


def find_recipe(name: str) -> Path:
    """`name`: a YAML file, or a recipe of the package, such as demo or mpt-7b/75. Raises UserError."""
    if name.endswith(".yaml") or Path(name).is_file():
        return Path(name)
    known = {str(file.relative_to(CONFIGS).with_suffix("")): file for file in sorted(CONFIGS.rglob("*.yaml"))
             if file.parent.name != "cluster"}
    if name not in known:
        raise UserError(f"there is no recipe {name}; give a .yaml file or one of: {', '.join(known)}")
    return known[name]
