"""Text is UTF-8 whatever the locale says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

_TOP = Path(__file__).parents[1]
_UMLAUTS = "Größe: {question} → 答"


def _takes_the_locale(call: ast.Call) -> bool:
    """A call that opens text without saying in which encoding."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    of_object = isinstance(call.func, ast.Attribute)
    name = call.func.attr if of_object else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if of_object else ""
    if "encoding" in given:
        return False
    if name == "open" and owner != "os":
        modes = [given.get("mode"), *call.args[0 if of_object else 1:][:1]]
        return not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
    if owner == "subprocess":
        return not {"text", "universal_newlines"}.isdisjoint(given)
    return of_object and owner != "artifacts" and name in ("read_text", "write_text")


def test_no_file_or_process_is_read_in_the_encoding_of_the_locale():
    found = [f"{file.relative_to(_TOP)}:{node.lineno}" for room in ("sparse_train", "jobs", "launch")
             for file in (_TOP / room).rglob("*.py") for node in ast.walk(ast.parse(file.read_bytes()))
             if isinstance(node, ast.Call) and _takes_the_locale(node)]
    assert not found, f"say encoding='utf-8' in {', '.join(found)}"


def test_prompts_keep_their_letters_in_a_process_of_another_locale(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: {{prompt: '{_UMLAUTS}'}}\nprune: {{sparsity: 0.5}}\n", encoding="utf-8")
    code = ("import locale, sys; from pathlib import Path; from sparse_train import artifacts\n"
            "from sparse_train.config import RunConfig; from sparse_train.config.load import dump_config, load_config\n"
            "config = load_config(RunConfig, recipe := Path(sys.argv[1]))\n"
            "artifacts.write_text(recipe, dump_config(config)); assert load_config(RunConfig, recipe) == config\n"
            "print(locale.getpreferredencoding(False), ascii(config.task.prompt))")
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, encoding="utf-8", env={
        **os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    encoding, prompt = done.stdout.strip().split(" ", 1)
    assert encoding.lower() not in ("utf-8", "utf8") and ast.literal_eval(prompt) == _UMLAUTS, done.stderr
