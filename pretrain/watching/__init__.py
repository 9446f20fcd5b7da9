"""What a run tells of itself while it trains: metrics, the screen, its history."""
