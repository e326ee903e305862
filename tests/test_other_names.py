"""Flags and keys of other programs: what is answered, that it is no nonsense, and that it can be typed."""

from __future__ import annotations

import re
import shlex

import pytest

from parameters import specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.other_names import ANSWER_TO, ANSWERS, PLACE, SAME, answer_to, bare
from utils_alg1.base.problems import explain, nearest
from utils_alg1.console.command_line import parse_command_line
from utils_alg1.console.dialogue import COMMANDS

# Every setting of the train.py and sample.py of nanoGPT, with a value.
NANOGPT = """
out_dir=out eval_interval=250 log_interval=10 eval_iters=200 eval_only=True always_save_checkpoint=False
init_from=resume wandb_log=True wandb_project=owt wandb_run_name=mini dataset=shakespeare_char
gradient_accumulation_steps=1 batch_size=64 block_size=256 n_layer=6 n_head=6 n_embd=384 dropout=0.2
bias=False learning_rate=1e-3 max_iters=5000 weight_decay=0.1 beta1=0.9 beta2=0.99 grad_clip=1.0
decay_lr=False warmup_iters=100 lr_decay_iters=5000 min_lr=1e-4 backend=nccl device=cpu dtype=float16
compile=False
""".split()
NANOGPT_SAMPLE = """
init_from=resume out_dir=out start=hello num_samples=3 max_new_tokens=9 temperature=0.8 top_k=200 seed=7
device=cpu dtype=float16 compile=False
""".split()
# The Trainer of Hugging Face's transformers and the flags of its example scripts: those of everyday.
TRAINER = """
output_dir=out overwrite_output_dir do_train do_eval do_predict eval_strategy=steps evaluation_strategy=steps
per_device_train_batch_size=8 per_device_eval_batch_size=8 gradient_accumulation_steps=4
eval_accumulation_steps=1 learning_rate=5e-5 weight_decay=0.1 adam_beta1=0.9 adam_beta2=0.99 adam_epsilon=1e-8
max_grad_norm=1.0 num_train_epochs=3 max_steps=100 lr_scheduler_type=linear warmup_ratio=0.1 warmup_steps=10
log_level=info logging_dir=logs logging_strategy=steps logging_first_step logging_steps=10 save_strategy=steps
save_steps=500 save_total_limit=2 save_safetensors seed=1 data_seed=1 use_cpu no_cuda bf16 fp16 tf32=True
local_rank=0 ddp_backend=nccl dataloader_drop_last dataloader_num_workers=2 dataloader_pin_memory=False
eval_steps=100 eval_on_start run_name=mine disable_tqdm=True remove_unused_columns load_best_model_at_end
metric_for_best_model=loss greater_is_better=False label_smoothing_factor=0.1 optim=adamw_torch
group_by_length report_to=none push_to_hub resume_from_checkpoint=true hub_model_id=x gradient_checkpointing
torch_compile torch_compile_backend=inductor model_name_or_path=gpt2 tokenizer_name=gpt2 dataset_name=wikitext
train_file=a.txt validation_file=b.txt validation_split_percentage=5 block_size=128
deepspeed=ds.json fsdp=full_shard
""".split()

# What the command line of train.py answers to a flag, and a file to a key.
ANSWERED = [
    ("--lr_decay_iters=5000", ": leave it out: the schedule ends at --max-iters"),
    ("--lr-decay-iters 5000", ": leave it out: the schedule ends at --max-iters"),
    ("lr_decay_iters: 5000", ": leave it out: the schedule ends at max_iters"),
    ("--eval_only=True", ": it is another script: python inference.py --score PATH"),
    ("--validation_file b.txt", "; did you mean --val-data?"),
    ("--warmdown-iters 9", ": use --lr-schedule wsd: it decays over the last fifth of the steps"),
    ("--amp", "; did you mean --dtype bfloat16?"),
    ("amp: true", "; did you mean dtype: bfloat16?"),
    ("amp: false", "; did you mean dtype: float32?"),
    ("--report-to wandb", ": leave it out: Aim and TensorBoard log every run"),
    ("--report_to none", ": use --no-tensorboard and --no-aim"),
    ("report_to: none", ": use tensorboard: false and aim: false"),
    ("--decay_lr=False", "; did you mean --lr-schedule constant?"),
    ("--decay_lr False", "; did you mean --lr-schedule constant?"),
    ("--decay_lr", ": use --lr-schedule cosine or --lr-schedule constant"),
    ("decay_lr: true", "; did you mean lr_schedule: cosine?"),
    ("--wandb_log=False", "; did you mean --no-aim?"),
    ("--always_save_checkpoint=False", "; did you mean --checkpoint-interval 0?"),
    ("--no_cuda False", ": leave it out: --device is a GPU where there is one"),
    ("--resume_from_checkpoint False", ": leave it out: a run starts from scratch"),
    ("--disable_tqdm False", ": leave it out: progress is shown"),
    ("init_from: resume", ": it is a flag, for the command line: --resume latest"),
    ("init_from: out/a.safetensors", ": it is a flag, for the command line: --init-from PATH"),
    ("--dataset=shakespeare_char", "; did you mean --data shakespeare?"),
    ("dataset: openwebtext", ": use data_path, a text file"),
    ("dataset: shakespeare_char", "; did you mean data_path: shakespeare?"),
    ("--fp16 True", "; did you mean --dtype float16?"),
    ("--per_device_train_batch_size 8", "; did you mean --batch-size?"),
    ("--gradient_accumulation_steps 8", ": use --grad-accum-steps, which counts those of one process"),
    ("--lr_scheduler_type cosine", "; did you mean --lr-schedule?"),
    ("--lr_scheduler_type constant_with_warmup", ": use --lr-schedule constant with --warmup-iters"),
    ("--resume_from_checkpoint true", "; did you mean --resume latest?"),
    ("--resume_from_checkpoint out", "; did you mean --resume?"),
    ("--trainer.max_steps=9", "; did you mean --max-iters?"),
    ("--temperature 1", ": it is for sampling: python inference.py"),
    ("quiet: true", ": it is a flag, for the command line"),
]


# With underscores, as nanoGPT writes its flags: script, command line, and the name and value that come of it.
UNDERSCORES = [
    ("train", "--max_iters 5", "values", {"max_iters": "5"}),
    ("train", "--max_iters=5 --run_tag=a_b", "values", {"max_iters": "5", "run_tag": "a_b"}),
    ("train", "--no_aim --init_from a_b.safetensors", "init_from", "a_b.safetensors"),
    ("train", "--no_aim", "values", {"aim": False}),
    ("inference", "--max_new_tokens 7", "max_new_tokens", 7),
    ("search", "--sampler_seed=3", "sampler_seed", 3),
    ("compare", "--runs_dir other_runs", "runs_dir", "other_runs"),
]


@pytest.mark.parametrize(("script", "line", "name", "value"), UNDERSCORES)
def test_a_flag_may_be_written_with_underscores(script, line, name, value):
    import importlib

    options = importlib.import_module(script).parse_command_line(line.split())
    options = options[0] if script == "search" else options  # and those of train.py
    assert getattr(options, name) == value


@pytest.mark.parametrize("line", ["--max_iters 5 --max-iters 6", "--max-iters 5 --max_iters 6"])
def test_both_spellings_are_one_flag(line):
    with pytest.raises(Alg1Error, match="--max-iters is given 2 times: --max-iters 5, --max-iters 6"):
        parse_command_line(line.split())


def as_known(name: str) -> str:
    """Return a parameter as `parse_command_line` knows it."""
    return specs()[name].flag if name in specs() else name


def flags_of(script: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the flags that a script knows."""
    import importlib

    from utils_alg1.console.command_line import Parser

    known: list[str] = []
    parse = Parser.parse_args

    def remember(parser: Parser, *arguments, **options):
        known.extend(parser._option_string_actions)
        return parse(parser, *arguments, **options)

    monkeypatch.setattr(Parser, "parse_args", remember)
    importlib.import_module(script).parse_command_line([])
    return known


@pytest.mark.parametrize(("given", "answer"), ANSWERED)
def test_a_name_of_another_program_is_answered(given, answer):
    if given.startswith("--"):
        with pytest.raises(Alg1Error) as caught:
            parse_command_line(shlex.split(given))
        assert caught.value.message == f"unknown flag {re.split('[= ]', given)[0]}{answer}"
    else:
        import yaml

        ((name, value),) = yaml.safe_load(given).items()
        assert explain(name, specs(), value) == answer


@pytest.mark.parametrize("setting", [*NANOGPT, *TRAINER])
def test_train_py_and_files_know_every_name_of_nanogpt_and_of_the_trainer(setting, monkeypatch):
    name, _, value = setting.partition("=")
    known = flags_of("train", monkeypatch)
    for word in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert word in known or answer_to(word, known, value)
    assert name in specs() or answer_to(name, specs(), value)


@pytest.mark.parametrize("setting", NANOGPT_SAMPLE)
def test_inference_py_knows_every_name_of_nanogpts_sample_py(setting, monkeypatch):
    known = flags_of("inference", monkeypatch)
    name, _, value = setting.partition("=")
    assert f"--{name}" in known or answer_to(f"--{name}", known, value)


@pytest.mark.parametrize(
    ("script", "given", "answer"),
    [
        ("inference", "--out_dir=out", "; did you mean --run?"),
        ("inference", "--init_from=resume", ": leave it out: it samples the latest run"),
        ("inference", "--start=hello", "; did you mean --prompt?"),
        ("inference", "--dtype=float16", ": leave it out: sampling computes in float32"),
        ("inference", "--max-iters 5", ": it is a flag of train.py"),
        ("inference", "--do_sample False", "; did you mean --temperature 0?"),
        ("compare", "--out_dir=out", ": use --runs-dir: every run gets a folder of its own in it"),
        ("compare", "--learning-rate 1", ": it is a flag of train.py"),
        ("compare", "--lr_decay_iters 1", ""),
        ("search", "--n_trials 9", "; did you mean --trials?"),
        ("search", "--num_workers 2", "; did you mean --workers?"),
        (
            "search",
            "--num_train_epochs 2",
            ": use --max-iters: it counts steps, of --batch-size x --block-size x",
        ),
        ("train", "--n_trials 9", ": it is for a search: python search.py"),
    ],
)
def test_the_other_scripts_answer_with_what_they_know(script, given, answer):
    import importlib

    with pytest.raises(Alg1Error) as caught:
        importlib.import_module(script).parse_command_line(shlex.split(given))
    expected = f"unknown flag {re.split('[= ]', given)[0]}{answer}"
    assert caught.value.message.startswith(expected) and (answer or caught.value.message == expected)


@pytest.mark.parametrize(
    "word", ["min_iters", "log_interwal", "test_split", "nope", "beta3", "foo_bar", "k", "-m"]
)
def test_where_nothing_fits_nothing_is_suggested(word):
    assert explain(word, specs()) == "" == nearest(word, specs())


def test_every_name_in_an_answer_is_one_of_ours(monkeypatch):
    ours = {
        bare(flag)
        for script in ("train", "inference", "search", "compare")
        for flag in flags_of(script, monkeypatch)
    }
    ours |= specs().keys() | {bare(command) for command in COMMANDS}
    assert SAME.keys() <= ours
    for answers in ANSWERS.values():
        for answer in (answers,) if isinstance(answers, str) else answers:
            assert {name for name, *_ in PLACE.findall(answer)} <= ours, answer


def test_every_value_in_an_answer_is_taken():
    values = {
        pair
        for answers in ANSWER_TO.values()
        for answer in ((answers,) if isinstance(answers, str) else answers)
        for pair in re.findall(r"\{(\w+) ([^}]+)\}", answer)
    }
    flags = [
        ["--no-" + name] if value == "false" else [as_known(name), value]
        for name, value in values
        if name in specs()
    ]
    assert len(values) > 10 and all(map(parse_command_line, flags))


def test_no_name_is_answered_twice():
    assert len(ANSWER_TO) == sum(len(names.split()) for names in ANSWERS)


@pytest.mark.parametrize("word", ["True", "true", "False", "false"])
def test_compile_takes_what_nanogpt_gives_it(word, train, workdir):
    result = train("--print-config", f"--compile={word}")
    assert f"\ncompile: {'on' if word.lower() == 'true' else 'off'} " in result.out.replace("'", "")
