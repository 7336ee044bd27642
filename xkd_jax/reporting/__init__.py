"""What a run writes while it trains, and what is made of it afterwards."""
