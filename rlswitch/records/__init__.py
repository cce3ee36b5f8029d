"""What a run writes and shows: JSONL files, trackers, the console."""
