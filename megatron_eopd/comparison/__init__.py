"""Two runs side by side, for tools/compare_runs.py: metrics, checkpoints, exports, rollouts."""
