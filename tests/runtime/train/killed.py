"""Run by test_resume.py: trains once in peace, then again under SIGKILL at random moments.

python killed.py OUT SEED KILLS -> OUT/peace and OUT/killed, each with z.safetensors. Every run is a
fork of this process, so that torch is loaded once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

import t2kernels as t2k
from t2runtime.base_model import build_tokenizer
from t2runtime.tasks import Generated
from t2runtime.train import small_model, train


class Slow(Generated):
    """Time for a kill to fall into; random numbers of the process, which must resume too."""

    def __call__(self, count, split, seed):
        time.sleep(0.03)
        return super().__call__(count, split, seed)

    def grade(self, problems, completions):
        return [random.random() < 0.3 + 0.4 * torch.rand(()).item() for _ in completions]


def run(out: Path) -> None:
    """One run of twelve steps, taken up where it stands."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(5)
    tokenizer = build_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    t2k.convert(model, progress=False)
    cfg = small_model(
        steps=12, prompts=4, samples=4, max_new_tokens=3, validate_every=3, validation_problems=4,
        checkpoint_every=2, warmup=2, schedule="cosine",
    )  # fmt: skip
    train(model, tokenizer, Slow("add"), cfg, out, resume=True).save(out / "z.safetensors")


def fork(out: Path) -> int:
    """The process id of a run; it leaves without the clean-up of its parent."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(out)
            code = 0
        finally:
            os._exit(code)
    return pid


def main(out: Path, seed: int, kills: int) -> None:
    """Both runs."""
    (out / "killed").mkdir(parents=True)
    if os.waitpid(fork(out / "peace"), 0)[1] != 0:
        sys.exit("the run in peace failed")
    moments = random.Random(seed)
    done = 0
    while done < kills:
        pid = fork(out / "killed")
        time.sleep(moments.uniform(0.02, 0.45))
        os.kill(pid, signal.SIGKILL)
        done += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if (out / "killed" / "z.safetensors").exists():
            break
    if os.waitpid(fork(out / "killed"), 0)[1] != 0:
        sys.exit("the run after the kills failed")
    print(done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
