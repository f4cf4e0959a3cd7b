"""vLLM's offline `LLM.generate`. Runs in vLLM's environment. Job on stdin, JSON out."""

from vllm import LLM, SamplingParams

from loadtest.peers.timing import Prompts, measure, read_job, tell


def main() -> None:
    """Measures the job of the standard input."""
    job = read_job()
    llm = LLM(
        model=job["model"],
        dtype="bfloat16",
        max_model_len=job["max_model_len"],
        enable_prefix_caching=False,
    )

    def generate(prompts: Prompts, new: int) -> int:
        # text is not what is measured here, for anybody
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = llm.generate(asked, sampling, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    tell(measure(generate, job))


if __name__ == "__main__":  # its workers import this file again
    main()
