"""Benchmarks of the sweep service; each prints what it measured, ours and the stock parts side by side.

python -m tests.bench.kill        # SIGKILL at 20 random moments
python -m tests.bench.outage      # MLflow away for a minute
python -m tests.bench.logging     # against MLflowLoggerCallback
python -m tests.bench.overhead    # 2,000 trials of no work, against Tune alone
python -m tests.bench.quality     # against random search and OptunaSearch + ASHA, on a recorded table
python -m tests.bench.faults      # 50 faults in a sweep of 200 trials
"""
