"""Every command that a document shows is run: here, by a test that is named here, or by CI.

The commands of docs/tutorial.md are run in their order by test_tutorial.py, the scripts of
examples/ by test_examples.py.
"""

import shlex
import subprocess

import pytest

from tests.house.documents import DOCUMENTS, ROOT, commands, read

DATA_PREP = "tests/data_prep/test_documented.py"
SYNTHETIC = "tests/data_prep/synthetic/test_corpus.py"
MAKE_PRETRAIN = "tests/pretrain/test_make_pretrain.py"
EXAMPLE_TESTS = "tests/house/test_examples.py"

# Commands that take minutes, or need a trained model: who runs them.
RUN_ELSEWHERE = {
    "make pretrain": (MAKE_PRETRAIN, '"pretrain", "STEPS=20"'),
    "make pretrain MODEL=classic": (MAKE_PRETRAIN, '"pretrain", "MODEL=classic"'),
    "cp pretrain/configs/cpu_demo.yaml my.yaml": (MAKE_PRETRAIN, "shutil.copy("),
    "python -m pretrain check my.yaml": (MAKE_PRETRAIN, '"pretrain", "check", "my.yaml"'),
    "python -m pretrain launch my.yaml": (MAKE_PRETRAIN, '"pretrain", "launch", "my.yaml"'),
    "python -m pretrain launch": (EXAMPLE_TESTS, "one_machine.sh"),
    "python -m pretrain train": (MAKE_PRETRAIN, '"-m", "pretrain", "train"'),
    **{
        f"python -m data_prep {command}": (DATA_PREP, "docs/data.md")
        for command in (
            "tokenizer --input corpus/books 'corpus/web/*.jsonl.zst' --vocab-size 32000 --out tok",
            "build prep.yaml",
            "verify shards --full",
            "inspect shards --row 0",
            "repack shards --seq-len 8192",
            "merge shards",
            "build",
        )
    },
    "python -m benchmarks.data_prep": (DATA_PREP, "benchmarks.data_prep"),
    "python -m pretrain self-test my.yaml --nproc 2 --layout --small": (
        "tests/dist/test_layout_self_test.py",
        '"self-test", str(path), "--nproc", "2", "--layout", "--small"',
    ),
    **{
        f"python -m pretrain {command}": (f"tests/{file}", evidence)
        for command, file, evidence in (
            (
                "evaluate runs/first --by position --times 4",
                "pretrain/test_evaluate.py",
                '"position", times',
            ),
            (
                "cooldown runs/first --checkpoint 40000 --steps 4000 --out runs/first-at-40k",
                "dist/test_cooldown_branch.py",
                '"cooldown", str(run), "--checkpoint"',
            ),
            (
                "average runs/first --last 5",
                "pretrain/copies/test_copies.py",
                '"average", folder, "--last"',
            ),
            (
                "copy runs/first s3://bucket/first",
                "pretrain/copies/test_copies.py",
                '"copy", folder, url',
            ),
            (
                "prune runs/first s3://bucket/first-weights",
                "pretrain/copies/test_copies.py",
                '"prune", folder',
            ),
        )
    },
    "python -m pretrain downstream runs/first --tasks lambada_openai,hellaswag,arc_easy": (
        "tests/pretrain/evaluation/test_harness.py",
        '"downstream", str(root / "run"), "--include"',
    ),
    "python -m benchmarks.data_prep.synthetic_tasks": (SYNTHETIC, "synthetic_tasks.main("),
    "python -m pretrain evaluate RUN --by length": (
        "tests/pretrain/test_synthetic_task.py",
        'command("evaluate", "RUN", "--by", "length")',
    ),
    "python -m pretrain evaluate RUN --data.path tasks/parity/validation-256 --data.seq-len 256 "
    "--by position --json": (
        "tests/pretrain/test_synthetic_task.py",
        'command("evaluate", "RUN", *far, "--by", "position", "--json")',
    ),
    **{
        f"python -m data_prep {command}": (SYNTHETIC, "docs/synthetic.md")
        for command in (
            "synthetic parity --out tasks/parity --validation-length 256 --dense",
            "inspect tasks/parity/train --row 0",
        )
    },
    "python -m pretrain self-test my.yaml --nproc 2": (
        MAKE_PRETRAIN,
        '"pretrain", "self-test", path',
    ),
    'python -m pretrain generate runs/first --prompt "Once upon a time" --max-tokens 32': (
        "docs/tutorial.md",  # whose commands test_tutorial.py runs
        'generate runs/first --prompt "Once upon a time"',
    ),
    **{
        f"python -m xlstm_mcore.convert {command} imported": (
            "tests/xlstm_mcore/convert/test_import.py",
            f'"{command.split()[0]}"',
        )
        for command in ("from-hf hf", "from-nxai model.pt")
    },
    **{
        f"python -m {words}": ("tests/pretrain/test_from_public_weights.py", evidence)
        for words, evidence in (
            ("xlstm_mcore.convert from-hf hf --dry-run", '"from-hf", "hf", "--dry-run"'),
            ("data_prep tokenizer --from-hf hf --out tok", '"--from-hf", "hf", "--out", "tok"'),
            ("pretrain evaluate imported my.yaml", '"evaluate", "imported", "my.yaml"'),
        )
    },
    "python -m pretrain evaluate CKPT --data.path shards": (
        "tests/pretrain/test_hf_tokenizer.py",
        '"evaluate", str(copy), "--data.path"',
    ),
    **{
        f"python -m xlstm_mcore.convert {command} runs/first hf": ("docs/tutorial.md", command)
        for command in ("to-hf", "verify")
    },
    "python -m benchmarks.checkpoint": (
        "tests/pretrain/test_checkpoint_benchmark.py",
        "from benchmarks import checkpoint",
    ),
    "python -m benchmarks.trainer_overhead": (
        "tests/pretrain/test_trainer_overhead.py",
        "trainer_overhead.main(",
    ),
    "python -m benchmarks.trainer_overhead --replicas --steps 33": (
        "tests/pretrain/test_trainer_overhead.py",
        'trainer_overhead.main(["--quick", "--replicas"',
    ),
    **{
        f"python -m benchmarks.{name}": (
            "tests/xlstm_mcore/test_benchmarks.py",
            f'run("benchmarks.{name}"',
        )
        for name in ("train_step_cpu", "parity", "import_memory", "generation")
    },
    "python -m pretrain plan my.yaml --gpus 128 --gpu h100 --write planned.yaml": (
        "tests/pretrain/planning/cases.py",
        '"plan", str(run_file), "--gpus", "4"',
    ),
    "python -m benchmarks.large_runs.rehearsals": (
        "tests/pretrain/rehearsal/test_run_files.py",
        '"-m", "benchmarks.large_runs.rehearsals"',
    ),
    **{
        command: (
            "tests/kernels/benchmarks/test_gpu_proof.py",
            '"benchmarks.gpu_proof", "--out"',
        )
        for command in (
            "make gpu-proof",
            "python -m benchmarks.gpu_proof --out DIR --dry-run",
        )
    },
    "make gpu-pack": (
        "tests/kernels/benchmarks/test_gpu_pack.py",
        '"benchmarks.gpu_proof.pack", "--out"',
    ),
    "python -m benchmarks.block_roofline": (
        "tests/xlstm_mcore/test_benchmarks.py",
        'run("benchmarks.block_roofline"',
    ),
    "python -m benchmarks.large_runs.end_to_end": (
        "tests/xlstm_mcore/test_benchmarks.py",
        'run("benchmarks.large_runs.end_to_end"',
    ),
    "python -m benchmarks.slstm_forms": (
        "tests/kernels/benchmarks/test_slstm_forms.py",
        "slstm_forms.main([",
    ),
    "python -m benchmarks.kernel_resources": (
        "tests/kernels/triton/test_aot.py",
        '"-m", "benchmarks.kernel_resources"',
    ),
    **{
        f"python -m slurm {words}": (f"tests/slurm/{file}", evidence)
        for words, file, evidence in (
            ("render train my.yaml --nodes 4", "test_cli.py", '"render", "train"'),
            ("submit train my.yaml --nodes 4", "runs.py", '"submit", "train"'),
            ("submit train my.yaml --nodes 4 --dry-run", "policy.py", '"--dry-run"'),
            ("submit prep prep.yaml --nodes 64", "other_jobs.py", '"submit", "prep"'),
            ("submit evaluate RUN", "training.py", '"submit", "evaluate"'),
            ("submit evaluate RUN --every-checkpoint", "other_jobs.py", '"--every-checkpoint"'),
            ("submit preflight my.yaml --nodes 4", "nodes.py", '"submit", "preflight"'),
            ("submit convert RUN OUT", "training.py", '"submit", "convert"'),
            ("status RUN", "policy.py", '"status", run.run'),
            ("stop RUN", "policy.py", '"stop", run.run'),
            ("resume RUN", "policy.py", '"resume", run.run'),
        )
    },
    "python -m pretrain rewind runs/first --to 12000 --skip-samples 4096": (
        "tests/dist/test_rewind.py",
        '"rewind", str(run), "--to"',
    ),
    **{
        f"python -m pretrain report runs/first{more}": (
            "tests/pretrain/test_report_page.py",
            f"report.main([first.folder{other}])",
        )
        for more, other in (("", ""), (" runs/second", ", second.folder"))
    },
    "python -m data_prep import-megatron": (
        "tests/data_prep/test_import_megatron.py",
        'run("import-megatron"',
    ),
    **{
        f"python -m experiments {words}": (f"tests/experiments/{file}", evidence)
        for words, file, evidence in (
            ("run parity --jobs 2", "grids.py", '["run", "parity"'),
            ("run mqar --jobs 2", "grids.py", '["run", "mqar"'),
            ("run parallel", "grids.py", '["run", "parallel"'),
            ("run generation", "grids.py", '["run", "generation"'),
            ("run scaling", "grids.py", '["run", "scaling"'),
            ("report parity", "test_definitions.py", '["report", "parity"'),
            (
                "slurm parity --size paper --site site.yaml > parity.sbatch",
                "test_definitions.py",
                '["slurm", "parity", "--size"',
            ),
            ("cell parity --number 0", "grids.py", '["cell", "parity", "--number", "0"'),
        )
    },
    **{
        f"python -m tests.oracle.compare{words}": ("tests/oracle/test_oracle.py", "compare.main(")
        for words in (
            "",
            " shards --work beside --hidden 128 --blocks 2 --batch 8 --figure losses.png",
        )
    },
    **{
        f"python -m tests.long_runs.{words}": ("tests/long_runs/test_long_runs.py", evidence)
        for words, evidence in (
            ("soak", "soak.soak("),
            ("soak --work soak", "soak.soak("),
            ("precision", "precision.compare("),
            ("precision shards --work precision", "precision.compare("),
            (
                "precision shards --work precision --hidden 64 --batch 8 --muon "
                '--variants fp32 bf16 "bf16 states"',
                "precision.compare(",
            ),
            (
                "precision shards --work precision --hidden 64 --batch 8 --patterns mmsm",
                "precision.compare(",
            ),
            (
                "precision shards --work seed-1 --steps 200 --hidden 64 --batch 8 --patterns mmsm "
                "--variants fp32 bf16 --seed 1",
                "precision.compare(",
            ),
        )
    },
    "python -m benchmarks.large_runs.start_up": (
        "tests/xlstm_mcore/test_first_import.py",
        "start_up.measure_all(",
    ),
    "python -m benchmarks.large_runs.first_step": (
        "tests/pretrain/rehearsal/cases.py",
        "first_step.parts(",
    ),
    "python -m pytest tests/dist/test_many_ranks.py --many-ranks -s": (
        "tests/conftest.py",
        '"--many-ranks"',
    ),
    "make setup": (".ci/run", "make --no-print-directory setup"),
    "make lint": (".ci/run", "make --no-print-directory lint"),
    "make test": (".ci/run", "make --no-print-directory test"),
    "make test-peers": (".ci/run", "make --no-print-directory test-peers"),
    "make test TESTS=tests/kernels": (".ci/run", 'TESTS="--dist-share'),
    "python -m benchmarks.loader": (
        "tests/pretrain/data/test_loader_benchmark.py",
        '"benchmarks.loader", *arguments',
    ),
    "python -m benchmarks.data_prep.plan_scale --documents 10000000": (
        "tests/data_prep/test_scale.py",
        "from benchmarks.data_prep.plan_scale import measure",
    ),
    "python -m benchmarks.loader.start": (
        "tests/pretrain/data/test_loader_benchmark.py",
        '"benchmarks.loader.start", *arguments',
    ),
    "python -m pytest tests/slurm/test_on_slurm.py -k four_ranks --all-layouts": (
        "tests/conftest.py",
        '"--all-layouts"',
    ),
    "python -m pytest tests/attack --attacks 1000": ("tests/conftest.py", '"--attacks"'),
    "python -m data_prep import-megatron corpus/wiki_text_document --tokenizer tok --out wiki "
    "--seq-len 2048": ("tests/data_prep/test_import_megatron.py", "corpus/wiki_text_document"),
    ".ci/run": (".ci/run", "make --no-print-directory test"),
}
COMMANDS = sorted({(d, c) for d in DOCUMENTS if d != "docs/tutorial.md" for c in commands(d)})
# A command is run once, whatever number of documents show it.
DISTINCT = sorted({command for _, command in COMMANDS})


def test_the_documents_show_commands():
    assert len(DISTINCT) >= 30


@pytest.mark.parametrize("command", DISTINCT)
def test_command_is_run(warm_python, command):
    shown_in = ", ".join(document for document, shown in COMMANDS if shown == command)
    if command in RUN_ELSEWHERE:
        path, evidence = RUN_ELSEWHERE[command]
        assert evidence in read(path), (
            f"{shown_in} shows `{command}`, which {path} does not run any more"
        )
        return
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], f"{shown_in} shows `{command}`, which no test runs"
    if words[2] == "pytest":
        file, keywords = ROOT / words[3], words[words.index("-k") + 1].split(" and ")
        assert all(f'"{keyword}"' in file.read_text(encoding="utf-8") for keyword in keywords)
        return
    demo = str(ROOT / "pretrain/configs/cpu_demo.yaml")
    words = [demo if word in ("my.yaml", "RUN.yaml") else word for word in words]
    done = subprocess.run(
        [warm_python.executable, *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
