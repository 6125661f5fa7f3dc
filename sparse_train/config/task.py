"""`task`: the data that a run trains on and is scored on (sparse_train/tasks)."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from sparse_train.config.base import Location, Positive, Section
from sparse_train.registry import TASKS


class TaskConfig(Section):
    name: Annotated[str, AfterValidator(TASKS.check)] = "arithmetic"
    """One of the table TASKS of sparse_train/registry.py. arithmetic, numbers and dialtones are generated and need no
    data; the others read task.path. A run without a name takes the generated one that its model.family can do."""
    path: Location | None = None
    """A folder or file, or the name of a data set on the hub; what it must hold is in the task's module."""
    subset: str | None = None
    """Of a hub data set, such as de-en or hi."""
    train_split: str = "train"
    """What is trained on, as the data calls it: a hub split, a file's name without its ending, a value of an index's
    column `split`. Several are joined by +, such as train+validation."""
    test_split: str = "test"
    """What is evaluated on, likewise."""
    languages: tuple[str, str] = ("en", "de")
    """translation: from and to, as the data set calls them."""
    language: str | None = None
    """speech: for Whisper's multilingual tokenizers, such as hindi."""
    prompt: str | None = None
    """Template of the prompt in training and evaluation, such as "Question: {question}\\nAnswer:"; None: the task's."""
    answer: str | None = None
    """Template of the answer."""
    test_prompt: str | None = None
    """Template of the prompt in evaluation, where it differs."""
    chat: bool = False
    """Whether question and answer are turns of a chat, written by the chat template of the model's tokenizer: in
    training, calibration and evaluation. The task chat always is."""
    system: str | None = None
    """The system message of each chat; None: none, or what the template writes without one. The task chat puts it in
    front of conversations that have none."""
    shots: Annotated[int, Field(ge=0)] = 0
    """gsm8k: solved training examples in front of each test prompt, in its template."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of data that comes without a split: the share whose text hashes into the test split."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """More unusable rows than this are an error; fewer are counted and named in the log."""
    max_length: Positive = 512
    """Longest example in tokens; longer training examples are left out, counted and some of them named in the log."""

    options: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Settings of a task that another package adds; the task's own schema checks them."""

    _key: str = PrivateAttr("task")

    @model_validator(mode="after")
    def _system_is_of_a_chat(self) -> Self:
        if self.system is not None and not (self.chat or self.name == "chat"):
            raise ValueError("system is given without chat=true; give both, or leave it out")
        return self

    @property
    def key(self) -> str:
        """Its place in a run's config, such as task or prune.calibration; messages name it."""
        return self._key

    def split_name(self, split: str) -> str:
        """What the data calls "train" or "test"."""
        return self.train_split if split == "train" else self.test_split


class MixConfig(Section):
    share: Annotated[float, Field(gt=0, lt=1)]
    """Of the examples (with task.pack: of the windows) that a training reads; spread evenly."""
    task: TaskConfig
    """Whose training examples they are. {name: text, path: ...} is general text."""


class RunTaskConfig(TaskConfig):
    """A run's own task, with what only its trainings read."""

    pack: bool = False
    """Put short examples together in windows of at most max_length tokens, none of which attends to another; batch_size
    then counts windows. For models without an encoder."""
    mix: MixConfig | None = None
    """Other examples that the dense model's training and the fine-tunes read among those of the task."""

    @model_validator(mode="after")
    def _mixed_examples_fit_the_windows(self) -> Self:
        if self.pack and self.mix and self.mix.task.max_length > self.max_length:
            raise ValueError(f"mix.task.max_length={self.mix.task.max_length} is longer than a window, max_length="
                             f"{self.max_length}; give at most {self.max_length}")
        return self
