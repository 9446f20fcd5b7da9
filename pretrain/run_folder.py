"""The names of what a run keeps in its folder, `run.dir`, beside its checkpoints."""

CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.jsonl"
LOGS_FOLDER = "logs"
METRICS_FILE = "metrics.jsonl"
STARTS_FOLDER = "starts"
SUMMARY_FILE = "summary.json"
TENSORBOARD_DIR = "tensorboard"
