"""transformers' own `generate`, bf16, as its documentation has it. Job on stdin, JSON out."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from loadtest.peers.timing import Prompts, measure, read_job, tell


def main() -> None:
    """Measures the job of the standard input."""
    job = read_job()
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    # without the checkpoint's end-of-sequence token nothing stops early
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def generate(prompts: Prompts, new: int) -> int:
        ids = torch.tensor(prompts)  # [batch, prompt]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        return int(out[:, ids.shape[1] :].numel())

    tell(measure(generate, job))


if __name__ == "__main__":
    main()
