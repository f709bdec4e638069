"""How lite's mouth network is made (`python -m musetalk.training.train`) and judged (`… .evaluate`)."""
