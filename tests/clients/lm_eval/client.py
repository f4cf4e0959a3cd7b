"""lm-eval: log-likelihoods over HTTP equal those of its own Hugging Face backend."""

import os

import lm_eval.models.huggingface
import lm_eval.models.openai_completions
from lm_eval.api.instance import Instance

CHECKPOINT = os.environ["EXPERTLINE_CHECKPOINT"]
# Questions and their answers, as a multiple-choice task asks them.
QUESTIONS = {
    "import os\nprint(os.path.": ["join('a', 'b'))", "jion(", "exists('x'))\n", "zzz"],
    "def add(a, b):\n    return": [" a + b", " a - b", " None", "\n\n"],
    "for i in range(": ["10):\n", "i):", "len(x)):\n    x", "class"],
    "class Reader:\n    def __init__(self": [
        "):\n",
        ", path):\n        self.path = path",
        "",
        " x",
    ],
}
TOLERANCE = 1e-3


def main() -> None:
    requests = [
        Instance("loglikelihood", {}, (question, answer), index)
        for question, answers in QUESTIONS.items()
        for index, answer in enumerate(answers)
        if answer
    ]
    reference = lm_eval.models.huggingface.HFLM(
        pretrained=CHECKPOINT,
        dtype="float32",
        device="cpu",
        batch_size=1,
        add_bos_token=True,
    ).loglikelihood(requests)
    served = lm_eval.models.openai_completions.LocalCompletionsAPI(
        model="nano",
        base_url=f"{os.environ['EXPERTLINE_URL']}/v1/completions",
        tokenizer=CHECKPOINT,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        num_concurrent=4,
        max_length=2048,
        add_bos_token=True,
    ).loglikelihood(requests)
    assert len(served) == len(reference) == len(requests)
    for request, (ours, our_greedy), (theirs, their_greedy) in zip(
        requests, served, reference, strict=True
    ):
        assert abs(ours - theirs) < TOLERANCE, (request.args, ours, theirs)
        assert our_greedy == their_greedy, request.args
    differences = (abs(a[0] - b[0]) for a, b in zip(served, reference, strict=True))
    print(f"largest difference of a log-likelihood: {max(differences):.1e}")


if __name__ == "__main__":
    main()
