"""Convert checkpoints between Hugging Face and Megatron-Core. Run with --help for examples."""

import argparse
import os
import re
import sys
from pathlib import Path

from megatron_eopd.cli import finite, positive

# Converting is work for disk and CPU. Before torch is imported: then it never meets a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

DESCRIPTION = """\
Hugging Face directories and Megatron distributed checkpoints, both ways. Tensors pass through one
at a time, so memory does not grow with the model. Families: Qwen3, Qwen3-MoE, Qwen2.5, Llama 3.
An interrupted conversion leaves OUT.unfinished; the same command goes on with it."""

EXAMPLES = """\
examples:
  python tools/convert_hf.py to-mcore /models/Qwen3-1.7B-Base /ckpt/qwen3-1.7b
  python tools/convert_hf.py to-mcore Qwen/Qwen3-8B /ckpt/qwen3-8b          # from the hub
  torchrun --nproc_per_node=8 tools/convert_hf.py to-mcore /models/Qwen3-32B /ckpt/qwen3-32b
  python tools/convert_hf.py to-mcore /models/Qwen3-8B /ckpt/qwen3-8b --layout megatron-lm
  python tools/convert_hf.py to-hf runs/mine/checkpoints/000200 /models/mine --dtype bfloat16
  python tools/convert_hf.py to-hf /megatron-lm /models/mine --hf-config Qwen/Qwen3-8B  # newest
  python tools/convert_hf.py to-hf /megatron-lm/iter_0001000 /models/mine --hf-config Qwen/Qwen3-8B
  python tools/convert_hf.py check /models/Qwen3-1.7B-Base /ckpt/qwen3-1.7b
  torchrun --nproc_per_node=4 tools/convert_hf.py check /models/Qwen3-8B /ckpt/qwen3-8b \\
      --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

A run takes either directory as student.hf_path or teacher.hf_path."""

MCORE_HELP = "a checkpoint of any parallel layout, or Megatron-LM's root, whose newest is taken"
DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    args = parse_args()
    # After the arguments: --help and wrong options answer at once.
    from megatron_eopd.errors import CheckpointError, ConfigError, RemoteError

    try:
        return args.run(args)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RemoteError as error:  # what any rank met, told to all of them
        cause: BaseException | None = error
        while isinstance(cause, RemoteError):  # a rank may have been told in turn
            cause = cause.__cause__
        if cause is not None and not isinstance(cause, (ConfigError, CheckpointError)):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="to-mcore | to-hf | check")
    add_to_mcore(commands)
    add_to_hf(commands)
    add_check(commands)
    for command in commands.choices.values():
        command.epilog, command.formatter_class = EXAMPLES, raw
        command.add_argument(
            "--distributed-timeout-minutes",
            type=finite,
            default=60.0,
            help="longest wait for another rank (default: 60)",
        )
    return parser.parse_args()


def add_to_mcore(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("to-mcore", help="Hugging Face → Megatron")
    command.add_argument("hf", metavar="HF_DIR", help="directory, or a name on the hub")
    command.add_argument("out", metavar="OUT_DIR", type=absolute)
    add_output_options(command)
    command.add_argument(
        "--layout",
        choices=("plain", "megatron-lm"),
        default="plain",
        help="plain: the checkpoint is OUT_DIR. megatron-lm: OUT_DIR is what Megatron-LM's --load "
        "takes, with a tracker file and the checkpoint in OUT_DIR/release (default: plain)",
    )
    command.add_argument(
        "--iteration",
        type=positive,
        metavar="N",
        help="with --layout megatron-lm: count on from here, in OUT_DIR/iter_000000N, instead of a "
        "release, from which Megatron-LM starts at 0",
    )
    command.set_defaults(run=run_to_mcore)


def add_to_hf(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("to-hf", help="Megatron → Hugging Face")
    command.add_argument("mcore", metavar="MCORE_DIR", type=Path, help=MCORE_HELP)
    command.add_argument("out", metavar="OUT_DIR", type=absolute)
    add_output_options(command)
    command.add_argument(
        "--hf-config",
        metavar="HF_DIR",
        help="where config.json and the tokenizer are (default: in MCORE_DIR, or the root above)",
    )
    command.add_argument(
        "--max-shard-size",
        type=num_bytes,
        default=5 * 1000**3,
        metavar="SIZE",
        help="of a safetensors file, e.g. 500MB; one parameter is never cut (default: 5GB)",
    )
    command.set_defaults(run=run_to_hf)


def add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("check", help="compare every tensor, and logits")
    command.add_argument("hf", metavar="HF_DIR", help="directory, or a name on the hub")
    command.add_argument("mcore", metavar="MCORE_DIR", type=Path, help=MCORE_HELP)
    command.add_argument("--no-logits", action="store_true", help="compare tensors only")
    command.add_argument("--prompt", help="text for the logits (default: 32 fixed random tokens)")
    command.add_argument(
        "--tolerance", type=finite, default=1e-4, help="of float32 logits (default: 1e-4)"
    )
    command.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    command.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    command.add_argument("--expert-model-parallel-size", type=int, default=1, metavar="N")
    command.add_argument("--rows", type=int, default=10, help="worst tensors shown (default: 10)")
    command.set_defaults(run=run_check)


def add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=DTYPES, help="cast (default: as it is stored)")
    command.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it exists")


def absolute(text: str) -> Path:
    """Of "." and "..", too, this has the name that the unfinished directory beside it needs."""
    return Path(text).resolve()


def num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 5GB")
    base = 1024 if "ib" in text.lower() else 1000
    return int(float(match[1]) * base ** " KMG".index(match[2].upper() or " "))


def run_to_mcore(args: argparse.Namespace) -> int:
    from megatron_eopd.conversion.megatron_lm import Root, load_options
    from megatron_eopd.conversion.to_mcore import to_mcore
    from megatron_eopd.errors import ConfigError
    from megatron_eopd.models.hf_config import read_hf_config

    if args.iteration is not None and args.layout != "megatron-lm":
        raise ConfigError("--iteration is of Megatron-LM's layout. Add --layout megatron-lm.")
    root = Root(args.iteration) if args.layout == "megatron-lm" else None
    with uncut_ranks(args) as context:
        hf_dir = hf_directory(args.hf, weights=True, context=context)
        to_mcore(hf_dir, args.out, torch_dtype(args.dtype), args.overwrite, context, root)
        say(context, f"{args.out}: a Megatron checkpoint of {args.hf}")
        if root is not None:
            options = load_options(root, args.out, read_hf_config(hf_dir), context.layout)
            say(context, f"Megatron-LM's options: {options}")
    return 0


def run_to_hf(args: argparse.Namespace) -> int:
    from megatron_eopd.conversion.to_hf import to_hf

    with uncut_ranks(args) as context:
        config_dir = args.hf_config and hf_directory(args.hf_config, weights=False, context=context)
        dtype = torch_dtype(args.dtype)
        to_hf(args.mcore, args.out, config_dir, dtype, args.max_shard_size, args.overwrite, context)
        say(context, f"{args.out}: a Hugging Face directory of {args.mcore}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    from megatron_eopd.conversion import check
    from megatron_eopd.parallel.init import regroup

    with uncut_ranks(args) as context:
        hf_dir = hf_directory(args.hf, weights=True, context=context)
        check.check_kinds(hf_dir, args.mcore, with_logits=not args.no_logits)
        token_ids = [] if args.no_logits else prepare_logits(args, hf_dir, context)
        differences = check.compare_tensors(hf_dir, args.mcore, context)
        different = [d for d in differences if d.num_different]
        say(context, table(differences[: args.rows]))
        say(context, f"tensors: {len(different)} of {len(differences)} differ")
        if args.no_logits:
            return int(bool(different))
        context = regroup(cut_ranks(args), context)
        logits = check.compare_logits(hf_dir, args.mcore, token_ids, context)
        say(
            context,
            f"logits of {len(token_ids) - 1} tokens on {context.layout.describe()}: largest "
            f"difference {logits.largest:.2e} (allowed {args.tolerance:.0e})",
        )
    return int(bool(different) or not logits.largest <= args.tolerance)


def prepare_logits(args: argparse.Namespace, hf_dir: Path, context) -> list[int]:
    """The tokens; what cannot work is said before all tensors are compared."""
    from megatron_eopd.conversion.check import probe_tokens
    from megatron_eopd.data.tokenizer import load_tokenizer
    from megatron_eopd.errors import ConfigError
    from megatron_eopd.models.fit import check_divides
    from megatron_eopd.models.hf_config import read_hf_config
    from megatron_eopd.parallel.layout import Layout

    hf_config = read_hf_config(hf_dir)
    ranks = context.layout.world_size, context.layout.rank
    check_divides(hf_config, Layout.from_config(cut_ranks(args), *ranks), "model")
    if args.prompt is None:
        return probe_tokens(hf_config.vocab_size)
    token_ids = list(load_tokenizer(hf_dir).encode(args.prompt))
    if len(token_ids) < 2:
        raise ConfigError(f"--prompt: {args.prompt!r} has fewer than two tokens. Give more text.")
    return token_ids


def table(differences: list) -> str:
    width = max(len(d.name) for d in differences)
    rows = [f"{'worst tensors':<{width}}  largest   different"]
    rows += [
        f"{d.name:<{width}}  {d.largest:<8.2e}  {d.num_different:,} of {d.num_elements:,}"
        for d in differences
    ]
    return "\n".join(rows)


def uncut_ranks(args: argparse.Namespace):
    """The ranks that torchrun started, each of them seeing the model whole."""
    from megatron_eopd.config import ParallelConfig
    from megatron_eopd.parallel.init import parallel_context

    parallel = ParallelConfig(distributed_timeout_minutes=args.distributed_timeout_minutes)
    return parallel_context(parallel, seed=0, longest_wait_s=0)


def cut_ranks(args: argparse.Namespace):
    """The layout in which logits are to be compared."""
    from megatron_eopd.config import ParallelConfig

    tp = args.tensor_model_parallel_size
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        sequence_parallel=tp > 1,  # models with experts need it, and others can do it
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )


def hf_directory(name: str, *, weights: bool, context) -> Path:
    """A local directory, or what the hub has under this name (downloaded by rank 0)."""
    from megatron_eopd.errors import ConfigError
    from megatron_eopd.parallel.collectives import from_rank_zero

    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ConfigError(f"{name}: no such directory, and no name on the hub (owner/model).")

    def download() -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
        try:
            return Path(
                snapshot_download(
                    name, allow_patterns=[*patterns, *["*.safetensors"][: int(weights)]]
                )
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigError(
                f"{name}: no such directory, and it cannot be had from the hub ({error})."
            ) from None

    return from_rank_zero(download, context.cpu_group)


def torch_dtype(name: str | None):
    import torch

    return None if name is None else getattr(torch, name)


def say(context, text: str) -> None:
    if context.layout.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
