"""What the project's Markdown promises, and the test that proves it.

`COMMANDS` has every command and every block of code that a reader may copy, `PROMISES` the sentences about them. A new
command without a proof fails `tests/test_readme.py`, and so does a sentence or a test that is no longer there.
"""

HERE = "tests/test_readme.py"
SWEEP, TRAIN, SUBMIT = "tests/ray_jobs/test_sweep.py", "tests/ray_jobs/test_train.py", "tests/ray_jobs/test_submit.py"
BAD, SERVICES = "tests/ray_jobs/test_bad_input.py", "tests/dashboards/test_services.py"

PRINTED = "tests/ray_jobs/test_commands.py"

QUICKSTART = f"{HERE}::test_the_first_commands_of_a_new_user"
RESULTS = f"{HERE}::test_commands_on_the_results_of_a_sweep"
TARGET = f"{HERE}::test_every_make_target_exists_and_runs_what_is_said"
OWN_TEXT = f"{HERE}::test_a_run_on_ones_own_text"
MODULES = f"{HERE}::test_every_measuring_program_exists"
RAY = f"{HERE}::test_rays_own_commands_have_these_options"
ACCOUNT = f"{HERE}::test_an_account_is_made_with_what_its_template_asks_for"
CLUSTER = f"{HERE}::test_our_cluster_file_and_quickstart_fit"
JOB = f"{SUBMIT}::test_a_job_is_followed_stopped_and_resumed_and_a_client_may_drop"
RAY_JOB = "tests/ray_jobs/test_job.py::test_a_submitted_sweep_runs_on_the_cluster_and_its_results_are_in_mlflow"
UP = "tests/ray_jobs/test_aws.py::test_up_and_grow_and_shrink_and_a_node_that_is_taken_away"
UI = "tests/ray_jobs/test_ui.py::test_mlflow_answers_on_localhost_alone_and_ends_with_the_command"
BENCH = "tests/ray_jobs/test_bench.py::test_a_table_and_json_show_every_row"
TWICE = f"{SWEEP}::test_a_second_signal_ends_a_sweep_at_once_and_it_goes_on"
KILLED = f"{SWEEP}::test_a_driver_killed_at_any_moment_is_resumed_to_the_same_sweep"
FAULTS = "tests/ray_jobs/test_faults.py"
FULL_DISK = f"{FAULTS}::test_a_full_disk_ends_the_sweep_and_no_trial"
LIFE = "tests/ray_jobs/test_growth.py::test_the_life_of_a_sweep"
MOVES = f"{SERVICES}::test_a_laptops_store_moves_there_whole_even_if_it_is_cut_short"
SHARED = f"{SERVICES}::test_a_sweep_goes_there_by_one_setting_and_is_there_after_a_restart"
HUB = "tests/gsa/data/test_corpus.py::test_rows_come_from_json_lines_and_parquet_and_dataset_folders"

# the beginning of a command, or of a block's first line, to its proofs; the longest that fits counts
COMMANDS: dict[str, tuple[str, ...]] = {
    "make sweep": (QUICKSTART, f"{SWEEP}::test_the_quickstart_at_a_smaller_size"),
    "make ui": (TARGET, UI),
    "make test": (TARGET,),
    "make test-gpu": (TARGET,),
    "make test-fast": (TARGET,),
    "python -m kernels.results": ("tests/kernels/test_results.py::test_the_table_of_forwards_is_that_of_the_numbers",),
    "make services": (TARGET, SHARED),
    "make services-stop": (TARGET, SHARED),
    "make services && source runs/services/mlflow.env": (TARGET, SHARED),
    "make chaos": (TARGET,),
    "make audit": (TARGET,),
    "source .venv/bin/activate": (QUICKSTART,),
    "gsa COMMAND --help": (f"{BAD}::test_every_command_explains_itself_with_an_example",),
    "gsa train": (OWN_TEXT, f"{TRAIN}::test_an_interrupted_run_goes_on_by_itself_to_the_same_model"),
    "gsa train configs/train/tiny.yaml name=mine 'data.corpus={source: hub": (HUB,),
    "gsa sweep": (QUICKSTART,),
    "gsa sweep configs/sweep/quickstart.yaml name=shared": (SHARED,),
    "gsa sweep --resume": (LIFE, KILLED),
    "gsa submit": (JOB,),
    "gsa report": (RESULTS,),
    "gsa propose": (RESULTS,),
    "gsa eval": (RESULTS,),
    "gsa ui": (UI,),
    "gsa bench": (BENCH, "tests/ray_jobs/test_bench.py::test_a_machine_without_a_gpu_is_refused_by_name"),
    "gsa doctor": (CLUSTER, f"{BAD}::test_doctor_finds_this_machine_well_and_a_foreign_kernels_package_wrong"),
    "gsa move": (MOVES,),
    "export RAY_ADDRESS=": (JOB,),
    "ray job list": (JOB,),
    "ray job logs": (RAY,),
    "ray job stop": (JOB,),
    "ray job submit": (RAY, RAY_JOB),
    "ray up": (RAY, UP),
    "ray dashboard": (RAY,),
    "ray attach": (RAY,),
    "ray down": (RAY, UP),
    "pip install": (ACCOUNT,),
    "subnet() {": (ACCOUNT,),
    "aws cloudformation deploy": (
        ACCOUNT,
        "tests/ray_jobs/test_cluster_file.py::test_our_account_is_what_cloudformation_takes",
    ),
    "python -m tests.": (MODULES,),
    "train: {include: ../train/tiny.yaml": (f"{HERE}::test_the_example_of_a_search_is_one",),
    "from gsa import": (f"{HERE}::test_the_python_of_the_readme_runs",),
    "cache = Cache(": (
        f"{HERE}::test_the_python_of_the_readme_runs",
        "tests/kernels/test_gpu.py::test_decoding_in_a_cuda_graph_equals_one_forward",
    ),
}

# a sentence, or enough of it, to its proofs
PROMISES: dict[str, tuple[str, ...]] = {
    "`make sweep` prints a leaderboard and what to run next.": (QUICKSTART,),
    "Run again, it shows the finished sweep or continues an interrupted one": (
        f"{SWEEP}::test_a_sweep_exists_once_and_a_finished_one_is_only_shown_again",
        LIFE,
    ),
    "`gsa COMMAND --help` has an example": (f"{BAD}::test_every_command_explains_itself_with_an_example",),
    "trains one model on any number of workers": (
        f"{TRAIN}::test_two_workers_train_one_model_and_mlflow_has_all_of_it",
    ),
    "run again, it goes on from its newest checkpoint": (
        f"{TRAIN}::test_an_interrupted_run_goes_on_by_itself_to_the_same_model",
    ),
    "searches; ends with the leaderboard and the Pareto front": (QUICKSTART,),
    "continues a sweep, whatever ended it: Ctrl-C, a crash, `kill -9`, a full disk": (LIFE, KILLED, FULL_DISK),
    "`num_samples`, `max_concurrent_trials`, `max_failures`, `confirm` and `budget` may change": (LIFE,),
    "A folder of runs may be moved or copied: `--storage` says where it is now": (LIFE,),
    "the same sweep as a job on a Ray cluster": (JOB,),
    "leaderboard, Pareto front, importances, curves, layers, cost, failures of a sweep, running or ended": (
        "tests/ray_jobs/test_report_html.py::test_json_holds_curves_layers_cost_and_importances_of_every_trial",
        "tests/ray_jobs/test_report_html.py::test_what_there_is_is_shown_and_what_there_is_not_is_said",
    ),
    "a search by layer, drawn from a trained model's own diagnostics": (
        "tests/ray_jobs/test_proposal.py::test_the_command_writes_a_sweep_and_says_how_to_run_it",
    ),
    "held-out loss, attention by layer and pass-key retrieval of a checkpoint": (
        f"{SWEEP}::test_the_quickstart_at_a_smaller_size",
    ),
    "MLflow on the sweep's store, on localhost": (UI,),
    "what this machine can and cannot do, and why; or a cluster that is not there yet": (
        f"{BAD}::test_doctor_finds_this_machine_well_and_a_foreign_kernels_package_wrong",
        CLUSTER,
    ),
    "Ctrl-C, SIGTERM (`timeout`, Slurm, Kubernetes) and a closed terminal let every running trial save": (
        LIFE,
        f"{TRAIN}::test_an_interrupted_run_goes_on_by_itself_to_the_same_model",
        "tests/gsa/training/test_stop.py::test_a_stop_saves_the_step_in_hand_and_the_run_goes_on_to_the_same_model",
        "tests/gsa/training/test_stop.py::test_workers_agree_to_stop_when_one_of_them_is_asked_to",
    ),
    "a second signal ends at once": (TWICE,),
    "A disk that is full or a cluster that dies ends a sweep with exit code 1 and fails no trial.": (
        FULL_DISK,
        f"{FAULTS}::test_a_sweep_whose_raylet_is_killed_ends_with_a_word_and_goes_on",
        f"{FAULTS}::test_a_run_whose_joined_cluster_dies_ends_with_a_word",
    ),
    "Exit codes: 0 done, 1 a run failed, 2 the request was wrong (one line says how, and nothing was started), 130": (
        QUICKSTART,
        f"{TRAIN}::test_a_run_that_fails_says_why_and_ends_as_failed",
        f"{BAD}::test_a_wrong_setting_of_a_sweep",
        LIFE,
    ),
    "or in the folder that `--storage` names": (f"{PRINTED}::test_storage_of_a_new_sweep_is_where_it_runs",),
    "Commands that are printed can be pasted; an option that would have no effect is refused.": (
        f"{PRINTED}::test_the_command_line_gives_back_what_a_printed_command_was_made_of",
        f"{PRINTED}::test_no_command_is_printed_but_through_the_one_function",
        f"{PRINTED}::test_an_option_without_an_effect_is_refused",
        OWN_TEXT,
    ),
    "Text files, JSON lines, parquet or a dataset of the Hugging Face hub": (HUB, OWN_TEXT),
    "**Layers in groups**": (
        "tests/ray_jobs/test_space.py::test_a_third_is_one_dimension_that_sets_its_layers_alike",
        "tests/gsa/test_config.py::test_a_list_names_its_layers_and_slices_in_it_are_pythons",
    ),
    "while no other trial computes there": (
        "tests/gsa/training/test_turns.py::"
        "test_nobody_trains_while_one_is_alone_and_steps_that_have_begun_are_all_it_waits_for",
    ),
    "on a CPU it is modelled for an H100, and `attention_latency_measured` says which": (
        "tests/gsa/evaluation/test_latency.py::test_without_a_gpu_the_modelled_cost_stands_in_and_says_so",
    ),
    "**Halving** pauses trials at rungs of equal steps, with their checkpoints, and takes the best up again": (
        "tests/ray_jobs/test_halving.py::test_at_most_one_in_the_factor_goes_on_and_they_are_the_best",
        "tests/gsa/training/test_loop.py::test_a_run_that_pauses_goes_on_to_the_same_model",
    ),
    "A stage may have a `context_length` of its own": (
        "tests/gsa/training/test_loop.py::test_each_stage_trains_at_its_own_context_length",
    ),
    "causality, gradients, no NaN": (
        "tests/gsa/evaluation/test_gate.py::test_a_mask_that_shows_the_next_token_is_a_leak",
        "tests/gsa/evaluation/test_gate.py::test_a_detached_gate_is_named",
        "tests/gsa/evaluation/test_gate.py::test_a_nan_that_only_equal_tokens_make_is_found",
    ),
    "**MLflow may be away**: what there is to log waits on disk, and is logged once, when it answers": (
        "tests/ray_jobs/test_mlflow_writer.py::test_all_is_told_and_once_through_outages_and_new_lives",
    ),
    "# beyond it, a trial is never the best": (
        "tests/ray_jobs/test_report_html.py::test_what_breaks_a_constraint_is_marked_and_never_on_the_front",
    ),
    "# are the best really better?": (
        "tests/ray_jobs/test_searcher.py::test_the_best_are_trained_again_with_other_seeds_once",
    ),
    "It checks the sweep and the upload's size": (f"{SUBMIT}::test_what_is_too_large_is_named",),
    "follows the job, which goes on without it": (JOB,),
    "a stopped job ends its trials and their runs": (JOB,),
    "A sweep runs as many trials at once as the cluster can ever hold, and says before it starts when that is none": (
        "tests/ray_jobs/test_capacity.py::test_what_an_autoscaler_may_start_counts",
        "tests/ray_jobs/test_capacity.py::test_what_can_never_run_is_refused_by_its_setting",
    ),
    "A node that is taken away costs its trials the steps since their last checkpoints": (
        "tests/ray_jobs/test_autoscaling.py::test_a_sweep_grows_its_cluster_loses_a_node_and_leaves_none",
    ),
    "names the line that is wrong; needs no account": (
        "tests/ray_jobs/test_cluster_file.py::test_the_line_that_is_wrong_is_named",
    ),
    "a head on demand on which no trial runs": (UP,),
    "sends runs to an MLflow server": (f"{TRAIN}::test_runs_and_checkpoints_go_to_a_tracking_server",),
    "on localhost only: runs in PostgreSQL": (f"{SERVICES}::test_nothing_listens_beyond_localhost",),
    "nobody in without a password": (f"{SERVICES}::test_nobody_comes_in_without_a_password",),
    "stops it, and all is kept": (SHARED,),
    "the runs that were on SQLite go there too, with all they have": (MOVES,),
    "Four arms are settings of one model": (
        f"{HERE}::test_the_four_arms_are_settings",
        "tests/gsa/attention/test_limits.py::test_the_four_arms_are_settings_of_one_module",
    ),
    "so a sweep can be killed at any moment": (KILLED,),
    "those that did not come to their end are never on the Pareto front": (
        f"{SWEEP}::test_a_trial_that_fails_is_kept_with_its_reason_and_the_sweep_goes_on",
    ),
    "nothing that is loaded can run code": (
        "tests/gsa/training/test_checkpoint.py::test_nothing_in_a_checkpoint_is_unpickled",
        "tests/dashboards/test_hostile.py::test_the_command_line_refuses_hostile_checkpoints",
    ),
    "no arrow points back": (TARGET,),
    # SECURITY.md
    "without it the head answers 401": (f"{SUBMIT}::test_who_is_refused_is_told_in_one_line",),
    "has some 400 requests that must be refused and change nothing": (
        "tests/dashboards/test_hostile.py::test_there_are_enough_of_them_and_none_twice",
    ),
    "Jinja escapes it; the page has no address of another site": (
        "tests/ray_jobs/test_report_html.py::test_hostile_names_reasons_and_settings_stay_text",
        "tests/ray_jobs/test_report_html.py::test_only_the_scripts_of_the_page_may_run_and_nothing_is_loaded",
    ),
    "Passwords and tokens stand in files of mode 0600": (
        f"{SERVICES}::test_passwords_are_in_private_files_and_nowhere_else",
    ),
}
