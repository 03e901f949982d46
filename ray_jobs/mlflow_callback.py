"""A sweep's runs in MLflow: one parent, and the state in which each trial's run ends.

Trials log their own metrics; who started a trial and saw it end is the one to say how.
"""

import logging

from mlflow.exceptions import MlflowException

from gsa.tracking import Tracking
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Event, Record
from ray_jobs.trial import TrialContext, run_key

logger = logging.getLogger(__name__)

STATES = {COMPLETE: "finished", PRUNED: "stopped_early", FAIL: "failed", RUNNING: "killed"}


class TrialRuns:
    """Keeps the runs of a sweep's trials in step with its record."""

    def __init__(self, tracking: Tracking, context: TrialContext) -> None:
        self.tracking, self.context = tracking, context

    def __call__(self, event: Event, entry: Entry) -> None:
        """Observe the record: end a run when its trial ends."""
        if event["event"] == "end":
            try:
                self.finish(entry)
            except MlflowException as error:
                logger.warning(
                    "%s: MLflow was not told that it ended; it will be at the end (%s)", entry.trial_id, error
                )

    def finish(self, entry: Entry) -> None:
        """Bring a trial's run to the state of its entry; a trial that died before it could make a run gets one."""
        key, state = run_key(self.context.sweep, entry.trial_id), STATES[entry.state]
        run = self.tracking.find_run(key)
        if run is None:
            tags = self.context.job(entry.proposal()).tags
            run_id = self.tracking.start_run(key, entry.trial_id, self.context.parent, tags)
        elif self.tracking.state(run) == state:
            return
        else:
            run_id = run.info.run_id
        self.tracking.finish(run_id, state, entry.reason)

    def reconcile(self, record: Record) -> None:
        """Bring every trial's run to the state of the record: those that a crash or an outage left behind."""
        for entry in record.trials():
            self.finish(entry)
