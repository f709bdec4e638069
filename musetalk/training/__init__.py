"""How lite's mouth network is made (`… .train`) and judged: on strangers `… .judge`, videos `… .evaluate`."""
