"""Conversations: token ids are those of the tokenizer's own chat template, labels its assistant's turns."""

import copy
import functools
import itertools
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer
from transformers.generation import BaseStreamer

from sparse_train.artifacts import sign
from sparse_train.config import EvaluateConfig, ModelConfig, RunConfig, TaskConfig
from sparse_train.errors import UserError
from sparse_train.inference.load import Runtime
from sparse_train.launch.cli import main
from sparse_train.launch.submit.validate import validate
from sparse_train.models import Processor, build_model, build_processor, save_model
from sparse_train.tasks import Example, build_task, build_tokenizer, scored_examples, training_examples
from sparse_train.tasks.batch import collate, decoder_row, encode

_SPECIAL = ("<|begin|>", "<|start|>", "<|end|>", "<|stop|>")
_CHATML = ("{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")
_TEMPLATES = {
    # As SmolLM2's: ChatML, with a system message of its own where there is none.
    "chatml": "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}" + _CHATML,
    # As Llama 3's: starts with the beginning-of-text, trims what is said; the next turn follows without a space.
    "llama": ("{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|end|>"
              "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"),
    # With the marks that transformers reads, and turns that look otherwise once others follow.
    "marked": ("{% for m in messages %}{% if m['role'] == 'assistant' %}<|start|>assistant\n"
               "{{ '' if loop.last else '(' }}{% generation %}"
               "{{ m['content'] }}<|end|>{% endgeneration %}\n{% else %}<|start|>{{ m['role'] }}\n{{ m['content'] }}"
               "<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"),
    # As Gemma's: no system message, turns alternate, the assistant has another name.
    "no system": ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}"
                  "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
                  "{{ raise_exception('roles must alternate') }}{% endif %}<|start|>"
                  "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
                  "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"),
    # As Phi-3's: a stop behind the last turn alone.
    "stop": _CHATML.replace("{% endif %}", "{% else %}<|stop|>{% endif %}"),
    # As Llama 2's and Mistral's: text with the end-of-text behind answers, and spaces about them.
    "text": ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
             "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"),
}
_TURNS = [("user", "Tom has 3 eggs"), ("assistant", "and 4\n boxes"), ("user", " Eggs?"), ("assistant", "7"),
          ("user", "All?"), ("assistant", "Tom: 12 + 3")]


@functools.cache
def _plain_tokenizer():
    tokenizer = build_tokenizer(build_task(TaskConfig()), 300)
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    tokenizer.bos_token = "<|begin|>"
    start = tokenizer.bos_token_id  # in front of any text, so that a template's own would be doubled
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A",
                                                                    special_tokens=[("<|begin|>", start)])
    return tokenizer


def _tokenizer(template=None):
    tokenizer = copy.deepcopy(_plain_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def _messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def _answers(example, processor):
    """The text of each run of labelled tokens."""
    ids, labels = decoder_row(example, processor)
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    runs = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    return [processor.tokenizer.decode([token for token, _ in run]) for is_answer, run in runs if is_answer]


@pytest.mark.parametrize("name", _TEMPLATES)
def test_a_conversation_is_what_the_tokenizers_template_makes_of_it(name):
    tokenizer = _tokenizer(_TEMPLATES[name])
    processor = Processor(tokenizer)
    for system in (None, "Count eggs.") if name not in ("no system", "text") else (None,):
        first = () if system is None else (("system", system),)
        example = Example("All?", "Tom: 12 + 3", history=(*first, *_TURNS[:4]))
        ids, labels = decoder_row(example, processor)
        assert ids == tokenizer.apply_chat_template(_messages([*first, *_TURNS]))["input_ids"]
        prompt, answer = encode(example, processor)
        assert prompt == tokenizer.apply_chat_template(_messages([*first, *_TURNS[:5]]),
                                                       add_generation_prompt=True)["input_ids"]
        assert prompt + answer == ids and prompt == encode(Example("All?", "", history=example.history), processor)[0]
        before, end = (" ", tokenizer.eos_token) if name == "text" else ("", "<|end|>")
        assert _answers(example, processor) == [f"{before}{content}{end}" for role, content in _TURNS
                                                if role == "assistant"]
        batch = collate([example, Example("Q", "A", history=())], processor)
        assert batch.input_ids[0].tolist() == ids and batch.labels[0].tolist() == labels
        assert batch.labels[1, batch.attend[1]].tolist() == decoder_row(Example("Q", "A", history=()), processor)[1]
    if "bos_token" in _TEMPLATES[name]:
        assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.encode("a")[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template, num_kept, why", [
    # As Qwen3's, which shows thoughts in the last turn alone.
    (_CHATML.replace("{{ m['content'] }}", "{{ '<think>' if loop.last and m['role'] == 'assistant' }}"
                     "{{ m['content'] }}"), 1, "'Tom: 12 + 3': the template writes a turn differently"),
    # A thought that only the prompt has.
    (_CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"), 0, "mark what the assistant says"),
    (_CHATML.replace("<|end|>", "!"), 0, "without a special token, so a model would not learn to stop"),
    (_TEMPLATES["marked"].replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"), 0, "marks leave out"),
    ("{% if messages | length > 2 %}{{ raise_exception('too long a chat') }}{% endif %}" + _CHATML, 1, "too long a ch"),
    ("\ud800" + _CHATML, 0, "half of a surrogate pair"), ("{{ 1 / 0 }}", 0, "division by zero"),
    ("{% if %}", 0, "Expected an expression"),
    ("{{ messages.__class__.__mro__ }}" + _CHATML, 0, "access to attribute '__class__'"),
], ids=["thoughts", "prompted thoughts", "endless", "unmarked end", "long", "half", "zero", "broken", "unsafe"])
def test_conversations_that_the_template_cannot_write_are_left_out_with_the_reason(template, num_kept, why, tmp_path,
                                                                                   caplog):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"messages": _messages(_TURNS)}, {"prompt": "Tom?", "completion": "Yes"})))
    (tmp_path / "test.jsonl").write_text('{"prompt": "Ann?", "completion": "No"}\n')
    task, processor = build_task(TaskConfig(name="chat", path=str(tmp_path))), Processor(_tokenizer(template))
    if num_kept:
        examples, num_left_out = training_examples(task, processor, None)
        assert [example.prompt for example in examples] == ["Tom?"] and num_left_out == 1
        told = caplog.text
    else:
        with pytest.raises(UserError) as error:
            training_examples(task, processor, None)
        told = str(error.value)
    assert "or do not fit the model () or its chat template: the chat template cannot write" in told and why in told


def test_a_tokenizer_without_a_template_is_one_line():
    with pytest.raises(UserError, match=r"the tokenizer of a new model has no chat template.*leave chat out"):
        training_examples(build_task(TaskConfig(chat=True)), Processor(_tokenizer()), 1)
    with pytest.raises(UserError, match=r"a new model's tokenizer has no chat template; give the model"):
        validate(RunConfig.model_validate({"name": "a", "task": {"chat": True}, "prune": {"sparsity": 0.5}}))
    with pytest.raises(UserError, match=r"does not tell which characters a token stands for"):
        training_examples(build_task(TaskConfig(chat=True)), Processor(ByT5Tokenizer(chat_template=_CHATML)), 1)


def _rows(folder, **splits):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_messages_or_prompt_and_completion(tmp_path):
    system = ("system", "Count.")
    _rows(tmp_path, train=[{"messages": _messages([*_TURNS, ("user", "Thanks")])}, {"prompt": "P", "completion": "C"}],
          test=[{"messages": _messages([system, *_TURNS[:2]])}])
    config = TaskConfig(name="chat", path=str(tmp_path))
    assert list(build_task(config).examples("train")) == [
        Example("All?", "Tom: 12 + 3", history=tuple(_TURNS[:4])), Example("P", "C", history=())]
    assert build_task(config).examples("test")[0] == Example(*(text for _, text in _TURNS[:2]), history=(system,))
    told = build_task(config.model_copy(update={"system": "Be kind."}))
    assert told.examples("train")[1].history == (("system", "Be kind."),)
    assert told.examples("test")[0].history == (system,)  # it has one
    for bad, why in (({"messages": "no"}, "no list in column 'messages'"),
                     ({"messages": [{"role": "user"}]}, "no text in column 'content'"),
                     ({"messages": ["no"]}, "no text in column 'role'"),
                     ({"messages": _messages(_TURNS[:1])}, "no answer of the assistant's to a user"),
                     ({"messages": _messages(_TURNS[1:4])}, "no answer of the assistant's to a user"),
                     ({"messages": _messages([system, _TURNS[1]])}, "no answer of the assistant's to a user"),
                     ({"prompt": "P"}, "no text in column 'completion'"), ([], "no JSON object")):
        _rows(tmp_path, train=[bad])
        with pytest.raises(UserError, match=rf"1 of 1 rows cannot be used.*train\.jsonl line 1: {why}"):
            build_task(config).examples("train")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no train\.jsonl \(task.train_split\)"):
        build_task(config).examples("train")


def test_one_file_is_split_by_first_questions(tmp_path):
    _rows(tmp_path, train=[{"messages": _messages([("user", f"Q{i // 2}"), ("assistant", f"A{i}"), ("user", f"R{i}"),
                                                   ("assistant", "B")])} for i in range(400)])
    for path in (tmp_path, tmp_path / "train.jsonl"):
        task = build_task(TaskConfig(name="chat", path=str(path), test_share=0.25))
        train, test = ({example.history[0][1] for example in task.examples(split)} for split in ("train", "test"))
        assert not train & test and len(train | test) == 200 and 25 < len(test) < 75
        assert len(task.examples("train")) + len(task.examples("test")) == 400


def test_questions_and_answers_of_other_tasks_are_turns_where_the_config_says_so(tmp_path):
    row = {"question": "1 + 2?", "answer": "3\n#### 3"}
    _rows(tmp_path, train=[row], test=[row])
    config = TaskConfig(name="gsm8k", path=str(tmp_path), chat=True, system="Count.", shots=1)
    history = (("system", "Count."),)
    assert build_task(config).examples("train")[0] == Example("1 + 2?", "3\n#### 3", history=history)
    solved = "1 + 2?\n3\n#### 3\n\n"
    assert build_task(config).examples("test")[0] == Example(f"{solved}1 + 2?", "3\n#### 3", history=history)
    other = config.model_copy(update={"prompt": "Q: {question}", "answer": "A: {answer}"})
    assert build_task(other).problem("1?", "2") == Example("Q: 1?", "A: 2", history=history)
    for name in ("arithmetic", "numbers"):
        assert build_task(TaskConfig(name=name, chat=True)).examples("train")[0].history == ()
    for name in ("text", "speech", "dialtones"):
        with pytest.raises(UserError, match=f"task.chat=true: task {name} has no questions"):
            build_task(TaskConfig(name=name, path=str(tmp_path), chat=True))


def _saying(model, token):
    """Makes it say `token` at each position."""
    bias = torch.zeros(model.config.vocab_size)
    bias[token] = 1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


class _Told(BaseStreamer):
    """Counts how often it is told tokens: the prompt's, then each new one."""

    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1

    def end(self):
        pass


@functools.cache
def _chat_model():
    torch.manual_seed(0)
    processor = build_processor(ModelConfig(family="llama", d_model=32, n_layers=1, n_heads=4, max_seq_len=96),
                                _tokenizer(_TEMPLATES["chatml"]))
    return build_model(ModelConfig(family="llama", d_model=32, n_layers=1, n_heads=4, max_seq_len=96),
                       processor).eval(), processor


def test_an_answer_ends_where_the_template_ends_the_assistants_turn():
    model, processor = copy.deepcopy(_chat_model()[0]), _chat_model()[1]
    runtime = Runtime(_saying(model, processor.tokenizer.convert_tokens_to_ids("<|end|>")), processor)
    for history, expected in (((), 1), (None, 5)):
        told = _Told()
        assert runtime.complete("Tom?", 5, history=history, streamer=told) == "" and told.calls == 1 + expected


def test_a_chat_is_scored_by_its_answers(tmp_path):
    _rows(tmp_path, train=[{"prompt": "P", "completion": "C"}], test=[{"messages": _messages(_TURNS[:4])}] * 3)
    task, (model, processor) = build_task(TaskConfig(name="chat", path=str(tmp_path))), _chat_model()
    spec = EvaluateConfig(max_new_tokens=4, batch_size=2)
    examples, _ = scored_examples(task, processor, spec)
    score = task.score(model, processor, examples, spec)
    ids, labels = map(torch.tensor, decoder_row(examples[0], processor))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100).item()
    assert score.metrics["cross_entropy"] == pytest.approx(expected, rel=1e-4)
    assert score.metrics["num_examples"] == 3 and score.samples[0]["prediction"]
    assert (score.samples[0]["prompt"], score.samples[0]["answer"]) == (" Eggs?", "7")


def test_generate_chats_as_the_run_was_trained(tmp_path, monkeypatch):
    model, processor = _chat_model()
    folders = {name: tmp_path / name for name in ("bare", "raw", "told", "chat", "export/dense")}
    for folder in folders.values():
        save_model(folder, model, processor)
    for name, task in (("raw", {"name": "arithmetic"}), ("told", {"chat": True, "system": "Count."}),
                       ("chat", {"name": "chat"}), ("export", {"chat": True})):
        sign(tmp_path / name, {"stage": "finetune/ce", "config": {"task": task}})
    histories, complete_all = [], Runtime.complete_all

    def record(self, prompts, new_tokens, history, **options):
        histories.append(history)
        return complete_all(self, prompts, 1, history, **options)

    monkeypatch.setattr(Runtime, "complete_all", record)

    def history_of(name, *options):
        assert main(["generate", str(folders[name]), "--prompt", "Tom?", *options]) == 0
        return histories.pop()

    assert history_of("bare") == history_of("chat") == history_of("export/dense") == ()
    assert history_of("told") == (("system", "Count."),) == history_of("told", "--chat")
    assert history_of("raw") is None is history_of("told", "--no-chat") and history_of("raw", "--chat") == ()
