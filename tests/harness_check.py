#!/usr/bin/env python3
"""Compares `isobath eval --task` with lm-evaluation-harness, question by question.

Makes small data sets of a text in the layouts of seven public ones, and one by `isobath data task`,
and lets both programs score MODEL on them: the harness by its own tasks (arc_easy, hellaswag, piqa,
boolq, openbookqa, winogrande, and the groups mmlu and mmlu_continuation with 57 subjects), with
nothing replaced but where the rows come from, which scores are told, and which examples are shown.
The words are drawn blindly from the text, so the questions mean nothing; what is compared is every
log-likelihood, every answer, the accuracies and their standard errors, also of questions that are
longer than the model's window. Exit status 0 if all agree.

Needs lm-eval 0.4.13 with torch and transformers:
    python tests/harness_check.py --model runs/NAME/checkpoints/step-00000200 \
        --text assets/austen.txt --isobath target/release/isobath
"""

import argparse
import contextlib
import csv
import importlib.metadata
import json
import logging
import pathlib
import random
import subprocess
import sys
import tempfile

import datasets
import lm_eval
import torch
import transformers
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

VERSION = "0.4.13"
LETTERS = "ABCD"
MMLU = "cais/mmlu"
DRAWN = "drawn"

# Layouts of one file: the harness's task, and the split that it scores.
SPLITS = {
    "arc_easy": "test",
    "hellaswag": "validation",
    "piqa": "validation",
    "boolq": "validation",
    "openbookqa": "test",
    "winogrande": "validation",
}


class Words:
    """Phrases of a text, drawn at random."""

    def __init__(self, text: str, seed: int):
        self.text, self.random = text, random.Random(seed)

    def phrase(self, low: int, high: int) -> str:
        """Between `low` and `high` characters of the text as it is, but without white space around."""
        while True:
            length = self.random.randint(low, high)
            start = self.random.randrange(len(self.text) - length)
            phrase = self.text[start : start + length].strip()
            if phrase:
                # Now and then a character of several bytes, so that bytes are not characters.
                return phrase.replace("e", "\u00e9", self.random.choice([0, 0, 3]))

    def phrases(self, count: int, low: int, high: int) -> list[str]:
        return [self.phrase(low, high) for _ in range(count)]

    def answer(self, count: int) -> int:
        return self.random.randrange(count)


def row(task: str, words: Words) -> dict:
    """One question in the columns of `task`'s data set."""
    question = words.phrase(20, 400)
    if task in ("arc_easy", "openbookqa"):
        choices = {"text": words.phrases(4, 4, 80), "label": list(LETTERS)}
        rest = {"choices": choices, "answerKey": LETTERS[words.answer(4)]}
        if task == "arc_easy":
            return {"question": question, **rest}
        return {"question_stem": question + " " * words.answer(3), **rest}  # scored with the choice
    if task == "piqa":
        sol1, sol2 = words.phrases(2, 4, 80)
        return {"goal": question, "sol1": sol1, "sol2": sol2, "label": words.answer(2)}
    if task == "boolq":
        passage = words.phrase(100, 2000)
        return {"passage": passage, "question": words.phrase(20, 60), "label": words.answer(2)}
    if task == "winogrande":
        option1, option2 = words.phrases(2, 3, 20)
        sentence = f"{words.phrase(5, 60)} _ {words.phrase(5, 60)}"
        answer = str(1 + words.answer(2))
        return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}
    if task == "hellaswag":
        marks = ["[header] ", "[step]", " [title] ", "[", ""]
        ctx_b = words.phrase(1, 60)
        endings = [words.random.choice(marks) + ending for ending in words.phrases(4, 5, 90)]
        return {
            "activity_label": words.phrase(5, 15),
            "ctx_a": words.phrase(20, 300) + words.random.choice(marks),
            "ctx_b": ctx_b,
            "endings": endings,
            "label": str(words.answer(4)),
        }
    if task == MMLU:
        choices = words.phrases(4, 2, 60)
        return {"question": f" {question}\n", "choices": choices, "answer": words.answer(4)}
    raise ValueError(task)


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_mmlu(folder: pathlib.Path, subject: str, rows: dict[str, list[dict]]) -> None:
    for split, questions in rows.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        path = folder / split / f"{subject}_{split}.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            for question in questions:
                letter = LETTERS[question["answer"]]
                csv.writer(file).writerow([question["question"], *question["choices"], letter])


class AnyData:
    """The same splits, whatever data set is asked for."""

    def __init__(self, splits: dict[str, list[dict]]):
        self.splits = splits

    def __getitem__(self, _):
        return self.splits


@contextlib.contextmanager
def local_rows(rows):
    """Lets the harness's tasks take rows[data set, name][split] instead of downloading."""

    def download(task, *_, **__):
        splits = rows[task.DATASET_PATH, task.DATASET_NAME]
        task.dataset = datasets.DatasetDict(
            {split: datasets.Dataset.from_list(found) for split, found in splits.items()}
        )

    kept = ConfigurableTask.download
    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = kept


def accuracies(metrics: dict) -> dict[str, tuple[float, float]]:
    """Name to mean and standard error, of the harness's metrics of a task or group."""
    names = [key.removesuffix(",none") for key in metrics if key.endswith(",none")]
    return {
        name: (metrics[f"{name},none"], metrics[f"{name}_stderr,none"])
        for name in names
        if not name.endswith("_stderr")
    }


class Check:
    """The largest differences of one comparison; `failures` are what may not be."""

    def __init__(self, name: str, tolerance: float):
        self.name, self.tolerance = name, tolerance
        self.questions = self.answers = self.truncated = 0
        self.largest, self.failures = 0.0, []

    def near(self, what: str, found: float, expected: float) -> None:
        difference = abs(found - expected)
        self.largest = max(self.largest, difference)
        if not difference <= self.tolerance:
            self.failures.append(f"{what}: {found} here, {expected} in the harness")

    def sample(self, what: str, ours: dict, theirs: dict) -> None:
        expected = [float(response[0]) for response in theirs["filtered_resps"]]
        if len(expected) != len(ours["log_likelihoods"]):
            self.failures.append(f"{what}: another number of choices")
            return
        for index, (found, value) in enumerate(zip(ours["log_likelihoods"], expected)):
            self.near(f"{what}, choice {index}", found, value)
        for name in ("acc", "acc_norm", "acc_bytes"):
            if name in theirs:
                self.answers += 1
                if bool(theirs[name]) != ours[name]:
                    self.failures.append(f"{what}: {name} is {ours[name]}, {theirs[name]}")
        self.questions += 1

    def metrics(self, what: str, ours: dict, theirs: dict) -> None:
        for name, (mean, error) in accuracies(theirs).items():
            self.near(f"{what} {name}", ours[name]["mean"], mean)
            self.near(f"{what} {name} standard error", ours[name]["standard_error"], error)

    def report(self) -> bool:
        print(
            f"{self.name:27} {self.questions:4} questions ({self.truncated} truncated), "
            f"{self.answers} answers, largest difference {self.largest:.1e}: "
            f"{'FAIL' if self.failures else 'agree'}"
        )
        for failure in self.failures[:5]:
            print(f"    {failure}")
        return not self.failures


class Programs:
    """Both programs with one model."""

    def __init__(self, arguments: argparse.Namespace, folder: pathlib.Path):
        self.arguments, self.folder = arguments, folder
        model = arguments.model
        self.model = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=16)
        self.manager = TaskManager()

    def variant(self, task: str, **changes) -> str:
        """A file that includes one of the harness's own tasks and changes some of its settings."""
        own = self.manager.task_index[task].yaml_path
        path = self.folder / f"{task}.yaml"
        path.write_text(json.dumps({"include": str(own), "task": task, **changes}))  # is YAML, too
        return str(path)

    def harness(self, task, shots: int) -> dict:
        return lm_eval.simple_evaluate(
            model=self.model,
            tasks=[task],
            num_fewshot=shots,
            task_manager=self.manager,
            bootstrap_iters=1,
        )

    def isobath(self, *options: str) -> tuple[dict, list[dict]]:
        samples = self.folder / "samples.jsonl"
        command = [self.arguments.isobath, "eval", self.arguments.model, "--device", "cpu"]
        command += [*options, "--samples", str(samples), "--json"]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        lines = samples.read_text(encoding="utf-8").splitlines()
        return json.loads(told), [json.loads(line) for line in lines]

    def compare_one(self, name: str, task, path: pathlib.Path, shots: int, *options: str) -> bool:
        """A task of a single subject."""
        theirs = self.harness(task, shots)
        [(task_name, samples)] = theirs["samples"].items()
        report, ours = self.isobath("--task", str(path), "--shots", str(shots), *options)
        check = Check(name, self.arguments.tolerance)
        check.truncated = report["truncated"]
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        if len(samples) != len(ours):
            check.failures.append(f"{len(ours)} questions here, {len(samples)} in the harness")
        for index, (own, sample) in enumerate(zip(ours, samples)):
            check.sample(f"question {index}", own, sample)
        check.metrics("all", report, theirs["results"][task_name])
        return check.report()

    def compare_mmlu(self, group: str, path: pathlib.Path, shots: int, style: str) -> bool:
        """All subjects of `group`, whose tasks are called mmlu_SUBJECT and as the group ends."""
        theirs = self.harness(group, shots)
        options = ["--task", str(path), "--shots", str(shots), "--style", style]
        report, ours = self.isobath(*options)
        check = Check(f"{group}, {shots} shots", self.arguments.tolerance)
        check.truncated = report["truncated"]
        for subject in report["subjects"]:
            name = subject["name"]
            task = f"mmlu_{name}{group.removeprefix('mmlu')}"
            own = [sample for sample in ours if sample["subject"] == name]
            samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
            for index, (one, sample) in enumerate(zip(own, samples, strict=True)):
                check.sample(f"{name} {index}", one, sample)
            check.metrics(name, subject, theirs["results"][task])
        check.metrics("all", report, theirs["groups"][group])
        return check.report()


def mmlu_subjects() -> list[str]:
    """The subjects of MMLU, by the names of the harness's own files."""
    folder = pathlib.Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint or other Hugging Face folder")
    parser.add_argument("--text", required=True, help="a UTF-8 text to draw words from")
    parser.add_argument("--isobath", required=True, help="path of the isobath program")
    parser.add_argument("--questions", type=int, default=40, help="of each layout but MMLU's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="in nats, of a whole choice")
    arguments = parser.parse_args()
    version = importlib.metadata.version("lm-eval")
    if version != VERSION:
        print(f"this is lm-eval {version}; isobath follows {VERSION}", file=sys.stderr)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    text = pathlib.Path(arguments.text).read_text(encoding="utf-8")
    words = Words(text, arguments.seed)
    agreed = []

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        programs = Programs(arguments, folder)
        metrics = [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")]

        for task, split in SPLITS.items():
            rows = [row(task, words) for _ in range(arguments.questions)]
            path = folder / f"{task}.jsonl"
            write_lines(path, rows)
            splits = {name: rows for name in ("train", "validation", "test")}
            with local_rows(AnyData(splits)):
                spec = programs.variant(task, metric_list=metrics)
                agreed.append(programs.compare_one(task, spec, path, 0))

        # Examples: the first of another file; the harness's default is a random choice.
        shown, scored = ([row("arc_easy", words) for _ in range(count)] for count in (3, 20))
        write_lines(folder / "shown.jsonl", shown)
        write_lines(folder / "scored.jsonl", scored)
        spec = programs.variant("arc_easy", fewshot_config={"sampler": "first_n", "split": "train"})
        with local_rows(AnyData({"train": shown, "validation": scored, "test": scored})):
            path, other = folder / "scored.jsonl", folder / "shown.jsonl"
            agreed.append(
                programs.compare_one("arc_easy, 2 shots", spec, path, 2, "--shots-from", str(other))
            )

        path = folder / "drawn.jsonl"
        command = [arguments.isobath, "data", "task", arguments.text, "--out", str(path)]
        subprocess.run(
            [*command, "--questions", str(arguments.questions)], check=True, stdout=subprocess.DEVNULL
        )
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        spec = {
            "task": DRAWN,
            "dataset_path": DRAWN,
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": metrics,
        }
        with local_rows(AnyData({"test": rows})):
            agreed.append(programs.compare_one("data task", spec, path, 0))

        mmlu = {}
        for subject in mmlu_subjects():
            questions = 2 + words.answer(4)
            rows = {
                "dev": [row(MMLU, words) for _ in range(5)],
                "test": [row(MMLU, words) for _ in range(questions)],
            }
            mmlu[MMLU, subject] = rows
            write_mmlu(folder / "mmlu", subject, rows)
        with local_rows(mmlu):
            path = folder / "mmlu"
            agreed.append(programs.compare_mmlu("mmlu", path, 0, "letters"))
            agreed.append(programs.compare_mmlu("mmlu", path, 2, "letters"))
            agreed.append(programs.compare_mmlu("mmlu_continuation", path, 0, "texts"))

    print(
        f"lm-eval {version}, transformers {transformers.__version__}, torch {torch.__version__}: "
        f"{'PASS' if all(agreed) else 'FAIL'}"
    )
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
