"""llama.cpp as tests ask it: tokens of a text, log-probabilities after a prompt, greedy answers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)


class LlamaCpp:
    """A process that runs a GGUF file. A context manager."""

    def __init__(self, model: Path, lora: Path | None = None, context: int = 128) -> None:
        command = [sys.executable, str(Path(__file__).parent / "llama_cpp_worker.py"), str(model), str(context)]
        command += [] if lora is None else [str(lora)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self):
        for line in self.process.stdout:
            if line.strip() == "ready":
                return self
        raise AssertionError(f"llama.cpp refuses the file: {self.process.stderr.read()[-2000:]}")

    def __exit__(self, *args) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, path: str, **body):
        self.process.stdin.write(json.dumps([path, body]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"llama.cpp ended: {self.process.stderr.read()[-2000:]}")

    def tokens(self, text: str, special: bool = True) -> list[int]:
        return self._ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """A conversation by the chat template in the file."""
        return self._ask("/apply-template", messages=messages)["prompt"]

    def log_probabilities(self, prompt: list[int], vocabulary: int) -> torch.Tensor:
        """Of the token after the prompt, for the whole vocabulary: float32 [vocabulary]."""
        # An answer without text (an end token, a part of a character) has no probabilities: the bias makes it one
        # letter, and the probabilities are those before the bias.
        letter = self.tokens("e", special=False)[-1]
        bias = {"logit_bias": [[letter, 1e6]], "n_predict": 1, "n_probs": vocabulary}
        answer = self._ask("/completion", prompt=prompt, temperature=0, **bias, **_PLAIN)
        result = torch.full((vocabulary,), float("nan"))
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result

    def greedy(self, prompt: list[int], count: int, top: int = 2) -> list[dict[int, float]]:
        """The most probable tokens at each step of a greedy answer, by their log-probabilities, best first."""
        answer = self._ask("/completion", prompt=prompt, n_predict=count, temperature=0, n_probs=top, **_PLAIN)
        return [
            {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
            for step in answer["completion_probabilities"]
        ]


_PLAIN = {"cache_prompt": False, "return_tokens": True, "samplers": ["temperature"]}
