"""The names of what a run keeps in its folder, `run.dir`, beside its checkpoints."""

CONFIG_FILE = "config.yaml"
LOGS_FOLDER = "logs"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TENSORBOARD_DIR = "tensorboard"
