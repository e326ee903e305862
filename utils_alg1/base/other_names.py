"""Names of other programs, and what to write here in their place.

They are the flags and settings of nanoGPT's train.py and sample.py, of nanochat, of the Trainer of Hugging
Face's transformers, and words that people guess. Whatever is unknown as a flag of a script or as a key of a
file is looked up here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from utils_alg1.base.scripts import command

# Our name -> other names of the same thing, whose values mean the same.
SAME = {
    "learning_rate": "lr max_lr peak_lr base_lr",
    "max_iters": "max_steps steps num_steps n_steps train_steps iters iterations num_iterations num_iters",
    "batch_size": "bs device_batch_size micro_batch_size per_device_train_batch_size train_batch_size",
    "block_size": "context context_length context_size context_len seq_len seq_length sequence_length"
    " max_seq_len max_seq_length max_length model_max_length max_position_embeddings n_ctx n_positions",
    "n_embd": "d_model hidden_size embed_dim embedding_dim model_dim dim",
    "n_layer": "layers num_layers num_hidden_layers depth",
    "n_head": "heads num_heads num_attention_heads",
    "dropout": "dropout_rate resid_pdrop attn_pdrop embd_pdrop hidden_dropout_prob",
    "positions": "pos_emb pos_embd position_embedding_type",
    "qk_norm": "use_qk_norm",
    "weight_decay": "wd",
    "beta1": "adam_beta1 momentum",
    "beta2": "adam_beta2",
    "grad_clip": "max_grad_norm gradient_clip_val clip_grad_norm",
    "grad_accum_steps": "accumulate accumulation_steps accumulate_grad_batches",
    "lr_schedule": "scheduler schedule lr_scheduler lr_scheduler_type",
    "warmup_iters": "warmup_steps num_warmup_steps lr_warmup_steps",
    "min_lr": "lr_min",
    "eval_interval": "eval_steps eval_every eval_freq",
    "checkpoint_interval": "save_interval save_every save_steps checkpoint_every ckpt_interval",
    "keep_checkpoints": "save_total_limit",
    "patience": "early_stopping early_stopping_patience",
    "optimizer": "optim",
    "seed": "random_seed manual_seed data_seed",
    "device": "accelerator",
    "dtype": "torch_dtype",
    "threads": "num_threads n_threads",
    "data": "corpus input text train_file train_data data_file text_file input_file data_path",
    "val_data": "validation_file val_file eval_file valid_data val_data_path eval_data validation_data",
    "run_tag": "run_name wandb_run_name name",
    "tensorboard": "use_tensorboard",
    "resume": "resume_from_checkpoint resume_from resume_training",
    "quiet": "disable_tqdm",
    # inference.py
    "prompt": "start text input input_text",
    "max_new_tokens": "length max_length max_tokens num_tokens n_tokens tokens",
    "num_samples": "samples n_samples num_return_sequences",
    "stop": "stop_token stop_string eos_token",
    "interactive": "chat",
    "model": "model_path model_name_or_path checkpoint ckpt checkpoint_path ckpt_path weights load",
    "run": "out_dir output_dir run_dir",
    "quit": "exit q bye",
    # search.py and compare.py
    "trials": "n_trials num_trials max_trials",
    "workers": "jobs n_jobs num_workers",
    "study": "study_name",
    "space": "search_space",
    "storage": "database",
    "sort": "sort_by order_by",
}

# What a name of the tables is called where it is no flag: in files, and in the dialogue of inference.py.
OTHERWISE = {"data": "data_path", "max_new_tokens": "length"}

COMMAND_LINE = "{data_path?}it is a flag, for the command line"
LATEST = (
    "{resume latest}",
    f"{COMMAND_LINE}: --resume latest",
    "{run?}leave it out: it samples the latest run",
)
INITIAL = ("use {init_from}, a file of weights", f"{COMMAND_LINE}: --init-from PATH")

# Other names, or names with a value (name=value) -> what to write here: an answer, or several, of which the
# first counts whose names are all known where the other name was found. In an answer {name} and {name value}
# are ours; {name?} stands for nothing, but has to be known too. What is in SAME as well has this answer where
# our name is not known.
ANSWERS: dict[str, str | tuple[str, ...]] = {
    # where it is kept
    "out_dir output_dir": "use {runs_dir}: every run gets a folder of its own in it",
    "overwrite_output_dir": "{batch_size?}leave it out: every run gets a folder of its own",
    "logging_dir log_dir": "{batch_size?}leave it out: logs lie in the folder of the run",
    "push_to_hub hub_model_id hub_token hub_strategy": "leave it out: nothing is uploaded",
    "always_save_checkpoint": "use {checkpoint_interval}; the best is saved without it",
    "always_save_checkpoint=false": "{checkpoint_interval 0}",
    "save_strategy": "use {checkpoint_interval}, in steps",
    "save_strategy=no": "{checkpoint_interval 0}",
    "save_safetensors": "{batch_size?}leave it out: weights are always saved so",
    "load_best_model_at_end": "{export best}",
    "load_best_model_at_end=false": "{export last}",
    "metric_for_best_model greater_is_better": "{export?}leave it out: the best has the lowest val loss",
    # where a run starts
    "init_from": ("use {model}, a file of weights", *INITIAL),
    "model_name_or_path pretrained model weights load load_from": INITIAL,
    "init_from=resume resume=true resume_from_checkpoint=true resume_training=true continue": LATEST,
    "init_from=gpt2 init_from=gpt2-medium init_from=gpt2-large init_from=gpt2-xl": (
        "{batch_size?}leave it out: a token is a character, which GPT-2's are not"
    ),
    "init_from=scratch resume=false resume_from_checkpoint=false resume_training=false": (
        "{batch_size?}leave it out: a run starts from scratch"
    ),
    "checkpoint ckpt checkpoint_path ckpt_path": ("use {resume} or {init_from}", COMMAND_LINE),
    "resume resume_from_checkpoint resume_from resume_training": f"{COMMAND_LINE}: --resume RUN",
    "config print_config quiet verbose serve_tensorboard disable_tqdm": COMMAND_LINE,
    # the text
    "dataset dataset_name": "use {data}, a text file",
    "dataset=shakespeare_char dataset=shakespeare dataset=tinyshakespeare": "{data shakespeare}",
    "validation_split_percentage": "use {val_split}, a fraction of the text",
    "tokenizer tokenizer_name tokenizer_path encoding": "{batch_size?}leave it out: a token is a character",
    "num_workers dataloader_num_workers pin_memory dataloader_pin_memory dataloader_drop_last group_by_length"
    " remove_unused_columns": "{batch_size?}leave it out: batches are read from the text's tokens in place",
    # the model
    "bias": "{n_embd?}leave it out: which layers have a bias is fixed",
    "rope rotary use_rope": "{positions rotary}",
    "activation activation_function hidden_act": "{n_embd?}leave it out: the activation is ReLU",
    "d_ff n_inner intermediate_size ffn_dim": "leave it out: the feed-forward is 4 x {n_embd} wide",
    "n_kv_head num_key_value_heads": "leave it out: each of {n_head} has keys and values of its own",
    "tie_weights weight_tying tie_word_embeddings": "{n_embd?}leave it out: no weights are tied",
    # steps
    "epochs epoch num_epochs n_epochs max_epochs num_train_epochs": (
        "use {max_iters}: it counts steps, of {batch_size} x {block_size} x {grad_accum_steps} characters"
    ),
    "gradient_accumulation_steps": "use {grad_accum_steps}, which counts those of one process",
    "total_batch_size": (
        "use {grad_accum_steps}: a step has {batch_size} x {block_size} x that many characters"
    ),
    "do_train do_eval": "{batch_size?}leave it out: train.py trains, and evaluates",
    "eval_only": ("{score}", f"{{batch_size?}}it is another script: {command('inference.py')} --score PATH"),
    "eval_strategy evaluation_strategy": "use {eval_interval}, in steps",
    "eval_on_start": "{batch_size?}leave it out: a run begins with an evaluation",
    "per_device_eval_batch_size eval_batch_size eval_accumulation_steps": (
        "leave it out: {eval_iters} says how much text an evaluation reads"
    ),
    # learning rate and optimizer
    "decay_lr": "use {lr_schedule cosine} or {lr_schedule constant}",
    "decay_lr=true": "{lr_schedule cosine}",
    "decay_lr=false": "{lr_schedule constant}",
    "lr_decay_iters lr_decay_steps": "leave it out: the schedule ends at {max_iters}",
    "lr_scheduler_type=constant_with_warmup": "use {lr_schedule constant} with {warmup_iters}",
    "lr_scheduler_type=warmup_stable_decay": "{lr_schedule wsd}",
    "warmup_ratio": "use {warmup_iters}, in steps: that times {max_iters}",
    "warmdown_iters warmdown_ratio warmdown_steps cooldown_iters cooldown_steps cooldown_frac decay_iters"
    " decay_steps": "use {lr_schedule wsd}: it decays over the last fifth of the steps",
    "final_lr_frac min_lr_ratio min_lr_rate": "use {min_lr}: that times {learning_rate}",
    "embedding_lr unembedding_lr matrix_lr": "use {learning_rate}, which is for all weights",
    "betas": "use {beta1} and {beta2}",
    "adam_epsilon adam_eps epsilon eps": "{beta2?}leave it out: it is 1e-8",
    "optim=adamw_torch optim=adamw_torch_fused optim=adamw_hf": "{optimizer adamw}",
    "label_smoothing_factor label_smoothing": "{batch_size?}leave it out: the loss is the cross-entropy",
    # the machine
    "fp16 half": "{dtype float16}",
    "bf16 amp use_amp autocast": "{dtype bfloat16}",
    "fp32 fp16=false bf16=false amp=false use_amp=false": "{dtype float32}",
    "tf32": "leave it out: the products are computed in {dtype}",
    "mixed_precision precision": "use {dtype}: float32, bfloat16 or float16",
    "mixed_precision=no precision=32 precision=32-true": "{dtype float32}",
    "mixed_precision=fp16 precision=16 precision=16-mixed": "{dtype float16}",
    "mixed_precision=bf16 precision=bf16 precision=bf16-mixed": "{dtype bfloat16}",
    "gradient_checkpointing activation_checkpointing": (
        "leave it out: less memory is taken by a smaller {batch_size} with more {grad_accum_steps}"
    ),
    "torch_compile": "{compile on}",
    "torch_compile=false no_compile": "{compile off}",
    "torch_compile_backend torch_compile_mode": "{batch_size?}leave it out: it is chosen by the device",
    "gpu cuda use_cuda accelerator=gpu": "{device cuda}",
    "cpu use_cpu no_cuda use_cuda=false cuda=false": "{device cpu}",
    "use_mps_device mps": "{device mps}",
    "xpu use_xpu": "{device xpu}",
    "use_cpu=false no_cuda=false use_mps_device=false": "leave it out: {device} is a GPU where there is one",
    "backend ddp_backend": "{batch_size?}leave it out: it is NCCL on GPUs, gloo on CPUs",
    "local_rank gpus n_gpu n_gpus num_gpus devices num_processes nproc_per_node num_nodes ddp fsdp deepspeed"
    " strategy": "{batch_size?}leave it out: torchrun --nproc_per_node=N train.py starts N processes",
    # what is shown
    "log_interval log_every logging_steps logging_first_step logging_strategy": (
        "{batch_size?}leave it out: every step is logged"
    ),
    "wandb use_wandb wandb_log wandb_project wandb_entity wandb_mode report_to": (
        "{batch_size?}leave it out: Aim and TensorBoard log every run"
    ),
    "no_wandb wandb=false use_wandb=false wandb_log=false": "{aim false}",
    "report_to=none": "use {tensorboard false} and {aim false}",
    "report_to=tensorboard": "leave it out: TensorBoard is on; {aim false} switches Aim off",
    "report_to=aim": "leave it out: Aim is on; {tensorboard false} switches TensorBoard off",
    "disable_tqdm=false": "{batch_size?}leave it out: progress is shown",
    "log_level": ("use {quiet} or {verbose}", f"{COMMAND_LINE}: --quiet or --verbose"),
    # sampling
    "greedy do_sample=false": "{temperature 0}",
    "do_sample": "leave it out: only {temperature 0} draws nothing",
    "num_beams repetition_penalty presence_penalty frequency_penalty": (
        "leave it out: {temperature}, {top_k} and {top_p} alone decide what is drawn"
    ),
    "stream": "{temperature?}leave it out: characters appear as they are drawn",
    "dtype": "{temperature?}leave it out: sampling computes in float32",
    "compile": "{temperature?}leave it out: sampling compiles nothing",
    "prompt start temperature top_k top_p num_samples max_new_tokens do_predict": (
        f"{{batch_size?}}it is for sampling: {command('inference.py')}"
    ),
    "trials n_trials space study sampler": f"{{batch_size?}}it is for a search: {command('search.py')}",
}
ANSWER_TO = {name: answer for names, answer in ANSWERS.items() for name in names.split()}

PLACE = re.compile(r"\{(\w+)(\?)?(?: ([^}]+))?\}")  # {name}, {name?} or {name value}


def bare(name: str) -> str:
    """Return a flag, a command of the dialogue or a key as it would be a key: max_steps for --max-steps.

    Of a dotted name such as --trainer.max_steps it is the last part.
    """
    return name.lstrip("-:").replace("-", "_").rpartition(".")[2]


def _by_name(known: Iterable[str]) -> dict[str, str]:
    """Return the known names as they are written, by what they are called in the tables."""
    by_name = {bare(name): name for name in known}
    return by_name | {name: by_name[other] for name, other in OTHERWISE.items() if other in by_name}


def same_as(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the name in `known` that is `word` or means the same; or ""."""
    key, by_name = bare(word).lower(), _by_name(known)
    found = [key] if key in by_name else [name for name in by_name if key in SAME.get(name, "").split()]
    return f"; did you mean {by_name[found[0]]}?" if found else ""


def answer_to(word: str, known: Iterable[str], value: Any = None) -> str:
    """Return what to write for a name of another program, to be put behind it in a message; or "".

    Args:
        known: the names that are known where `word` was found: flags, or keys of a file.
        value: what `word` was set to, if that is known.
    """
    key, by_name = bare(word).lower(), _by_name(known)
    with_value = f"{key}={value}".lower() if isinstance(value, bool | str) else ""
    return _answer(with_value, by_name) or same_as(word, known) or _answer(key, by_name)


def _answer(key: str, by_name: dict[str, str]) -> str:
    """Return the first of the answers to a name whose names are all known; "" if there is none."""
    answers = ANSWER_TO.get(key, ())
    for answer in (answers,) if isinstance(answers, str) else answers:
        if all(name in by_name for name, *_ in PLACE.findall(answer)):
            text = PLACE.sub(lambda place: _written(by_name, *place.groups()), answer)
            return f"; did you mean {text}?" if PLACE.fullmatch(answer) else f": {text}"
    return ""


def _written(by_name: dict[str, str], name: str, unseen: str | None, value: str | None) -> str:
    """Return a place of an answer as it is written where its names were found, a command line or a file."""
    known = by_name[name]
    if unseen or value is None:
        return "" if unseen else known
    if not known.startswith("-"):
        return f"{known}: {value}"
    return known.replace("--", "--no-", 1) if value == "false" else f"{known} {value}"
