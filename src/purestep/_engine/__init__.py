"""From a call to what is run: plans, guards, counters, sparse rows, nested transforms."""
