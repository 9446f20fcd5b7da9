"""One command for one short GPU run: is it right, how fast is it, and where does the time go.

    python -m benchmarks.gpu_proof --out DIR --budget 480
    python -m benchmarks.gpu_proof --out DIR --dry-run

Each part runs in a process of its own with a deadline of its own, and a failure never stops the
rest. Every row is written to DIR/rows.jsonl as soon as it is known. DIR/proof.json and the table
come last. With `--dry-run` all parts run on the CPU, at tiny sizes and with the PyTorch
implementations: that shows that the script works, and nothing else.

**It has never run on a GPU.**
"""
