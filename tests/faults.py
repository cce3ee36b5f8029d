"""Every fault that a test injects, what rlswitch does about it, and the test.

tests/command/test_faults.py asserts that the tests exist; scripts/fault_pages.py puts a selection into
docs/faults.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    about: str
    injected: str
    does: str
    test: str
    """FILE::FUNCTION below tests/, with [CASE] for one case of several."""


PUSHES = [
    Fault(
        "The engine reloads its original checkpoint",
        "call vLLM's `reload_weights` without a path",
        "exit 3: `fingerprint`, the engine did not load the published weights",
        "engines/test_sabotage.py::test_reload_without_a_path",
    ),
    Fault(
        "The engine loads an older version",
        "point the reload at the previous version's files",
        "exit 3: `fingerprint`",
        "engines/test_sabotage.py::test_reload_of_an_old_versions_path",
    ),
    Fault(
        "An update too small to show in log-probabilities is lost",
        "load an old version whose log-probabilities are within the canary's bound",
        "exit 3: `fingerprint`",
        "engines/test_sabotage.py::test_an_update_too_small_for_logprobs_to_show",
    ),
    Fault(
        "A tensor is missing",
        "remove one tensor from the published file",
        "exit 3: `fingerprint`, `tensors missing: NAME`",
        "engines/test_sabotage.py::test_one_tensor_missing",
    ),
    Fault(
        "A tensor has the wrong shape",
        "truncate one tensor in the published file",
        "exit 3: `reload`, the files differ from what was published",
        "engines/test_sabotage.py::test_one_tensor_cut_short",
    ),
    Fault(
        "A tensor is written partially",
        "set its last row to zero",
        "exit 3: `fingerprint`, `tensors differ: NAME`",
        "engines/test_sabotage.py::test_the_end_of_one_tensor_not_written",
    ),
    Fault(
        "A bit flips",
        "flip one bit in the published file",
        "exit 3: `fingerprint`, `tensors differ: NAME`, and blames the files",
        "engines/test_sabotage.py::test_one_bit_flipped",
    ),
    Fault(
        "The right bytes end up in the wrong place",
        "swap q and k, which no sum can see",
        "exit 3: `canary`",
        "engines/test_sabotage.py::test_q_and_k_exchanged",
    ),
    Fault(
        "A tied `lm_head` keeps its old weights",
        "undo the repair: vLLM's CPU build 0.32 does this by itself",
        "exit 3: `canary`",
        "engines/test_sabotage.py::test_tied_head_left_stale",
    ),
    Fault(
        "Prefixes cached under older weights are reused",
        "skip the prefix cache reset after a push",
        "exit 3: `prefix cache`, with the number of tokens served from the cache",
        "engines/test_sabotage.py::test_prefix_cache_not_reset_across_a_push",
    ),
    Fault(
        "The prefix cache reset fails",
        "`reset_prefix_cache` returns false",
        "EngineError; nothing is generated",
        "switch/test_switch.py::test_a_push_that_is_not_proven_never_generates",
    ),
    Fault(
        "The engine holds a tensor that was not published",
        "report one more tensor",
        "ProofError names it",
        "proof/test_proof.py::test_an_extra_tensor_is_named",
    ),
    Fault(
        "The engine loaded nothing",
        "return an empty report",
        "ProofError says so",
        "proof/test_proof.py::test_nothing_loaded_is_said",
    ),
    Fault(
        "One of several workers has wrong weights",
        "change one report",
        "ProofError names the worker",
        "proof/test_proof.py::test_the_worker_at_fault_is_named",
    ),
    Fault(
        "A worker received the weights but holds others",
        "report live parameters that differ from those received",
        "ProofError",
        "proof/test_proof.py::test_live_parameters_that_differ_from_what_was_received_are_refused",
    ),
    Fault(
        "Published files change or disappear",
        "change a tensor, or delete the files, after publishing",
        "ProofError blames the files, not the engine",
        "proof/test_proof.py::test_changed_files_are_blamed",
    ),
    Fault(
        "Log-probabilities drift",
        "shift the canary by 0.2",
        "ProofError names sequence, token and gap",
        "proof/test_proof.py::test_the_canary_names_the_token_with_the_largest_gap",
    ),
    Fault(
        "Log-probabilities are NaN or infinite",
        "put NaN and infinity on one side and on both",
        "ProofError at any tolerance",
        "proof/test_proof.py::test_a_canary_that_is_not_finite_is_refused_at_any_tolerance",
    ),
    Fault(
        "The first push would teach too high a tolerance",
        "make its gap exceed the ceiling",
        "ProofError; the tolerance is not learned",
        "proof/test_proof.py::test_a_first_mean_above_the_ceiling_is_refused_and_teaches_nothing",
    ),
    Fault(
        "Weights change while asleep",
        "change them at level 1, where nothing is reloaded",
        "ProofError: `canary`",
        "switch/test_switch.py::test_weights_that_changed_while_asleep_at_level_1_are_found_out",
    ),
    Fault(
        "A frozen checkpoint changes on disk",
        "change one of its tensors",
        "ProofError names it; the engine does not serve it",
        "engines/test_frozen.py::test_a_checkpoint_that_changes_on_disk_is_not_served",
    ),
    Fault(
        "A push fails in a complete run",
        "damage one push",
        "exit 3 before any rollout; names the failed check",
        "engines/test_train.py::test_a_push_that_cannot_be_proven_stops_the_run_with_exit_3",
    ),
]

ORDER = [
    Fault(
        "`generate` is called on a sleeping engine",
        "call it on the real vLLM: asleep, half awake, not proven",
        "SwitchError at once; vLLM is not called",
        "engines/test_contract.py::test_generating_while_asleep_or_half_awake_raises_at_once",
    ),
    Fault(
        "The engine's verbs are called in the wrong order",
        "call every verb in every state",
        "SwitchError with the state; vLLM is not called, and the engine stays usable",
        "switch/test_switch.py::test_a_verb_works_in_its_state_and_in_every_other_raises_without_touching_vllm",
    ),
    Fault(
        "The KV cache wakes before the weights are valid",
        "wake it before a reload",
        "SwitchError",
        "switch/test_switch.py::test_the_kv_cache_is_not_woken_before_the_weights_mean_something",
    ),
    Fault(
        "`generate` is called before the first push",
        "call it on a new engine with its own checkpoint",
        "SwitchError: no published weights to serve",
        "switch/test_switch.py::test_a_fresh_engine_does_not_generate_from_its_own_checkpoint",
    ),
    Fault(
        "The engine is put to sleep twice",
        "release it twice",
        "it sleeps once",
        "switch/test_switch.py::test_letting_go_twice_sleeps_once",
    ),
    Fault(
        "A sleeping engine frees no memory",
        "make the real vLLM keep its memory",
        "stops with the GiB expected and found; the trainer does not start",
        "engines/test_contract.py::test_a_sleep_that_frees_nothing_is_reported",
    ),
    Fault(
        "The device is not freed",
        "leave free memory unchanged",
        "SwitchError names the holder",
        "switch/test_switch.py::test_a_device_that_is_not_given_back_stops_the_hand_over",
    ),
    Fault(
        "`release` fails",
        "raise in `release`",
        "the device stays with its holder",
        "switch/test_switch.py::test_a_release_that_fails_does_not_pass_the_device_on",
    ),
    Fault(
        "A push fails half-way",
        "raise in each of its verbs",
        "marks the engine as failed: every later verb raises SwitchError",
        "switch/test_switch.py::test_a_verb_that_fails_half_way_fails_the_engine_for_good",
    ),
    Fault(
        "Rollouts come from another policy version",
        "hand the trainer older and newer rollouts",
        "the trainer rejects them and names the prompt and both versions",
        "training/test_trainer.py::test_rollouts_of_another_version_are_refused",
    ),
]

ENGINE = [
    *(
        Fault(
            about,
            injected,
            "EngineError names prompt and sample; nothing is padded",
            "switch/test_switch.py::test_an_answer_that_is_not_a_rollout_is_refused",
        )
        for about, injected in (
            ("Too few completions", "return 3 for 4 requests"),
            ("An empty completion", "return no token"),
            ("Log-probabilities are missing", "return one for two tokens"),
        )
    ),
    Fault(
        "The server is silent",
        "accept a request and never answer",
        "EngineError after `engine.request_timeout_s`; the message names the setting",
        "engines/test_server.py::test_a_silent_server_is_given_up",
    ),
    Fault(
        "The server answers 500 or is down",
        "both",
        "EngineError names the address and the reason",
        "engines/test_server.py::test_errors_name_the_server_and_repeat_its_reason",
    ),
    Fault(
        "The server redirects",
        "answer with a redirect",
        "EngineError; the other address is never contacted",
        "engines/test_server.py::test_a_redirect_leads_nowhere",
    ),
    Fault(
        "A server lacks its control endpoints",
        "start it without them",
        "exit 2, with the right command",
        "engines/test_server.py::test_an_unfit_server_is_refused_with_the_command_that_starts_a_fit_one",
    ),
    Fault(
        "Two runs attach to one server",
        "attach a second run",
        "exit 2: each run would generate from the other's weights",
        "engines/test_server.py::test_one_run_at_a_time_is_attached_to_a_server",
    ),
    Fault(
        "A server does not report cached tokens",
        "start it without `--enable-prompt-tokens-details`",
        "EngineError names the flag",
        "engines/test_server_engine.py::test_a_server_that_does_not_tell_cached_tokens_is_refused",
    ),
    Fault(
        "vLLM does not start",
        "pass an unknown flag",
        "EngineError shows the end of its log; no process or file is left",
        "engines/test_server_engine.py::test_a_failed_start_says_why_and_leaves_nothing",
    ),
    Fault(
        "Another user connects to the socket",
        "check the permissions of the launched server's socket",
        "only the owner can enter its directory",
        "engines/test_server_engine.py::test_only_we_reach_the_socket",
    ),
]

PROCESSES = [
    Fault(
        "torch, transformers or vLLM cannot be imported",
        "make the import of torch raise",
        "exit 2 with the reason in one line, and how to reinstall",
        "command/test_environment.py::test_a_torch_that_cannot_be_imported_is_one_line",
    ),
    Fault(
        "The scheduler preempts the run while it samples rollouts",
        "send SIGTERM",
        "drops the rollouts, saves the previous step, exit 75; after a resume it ends with the same bytes",
        "engines/test_killed.py::test_a_run_killed_in_every_phase_ends_like_one_that_never_was",
    ),
    Fault(
        "The environment allows pickle between vLLM's processes",
        "`VLLM_ALLOW_INSECURE_SERIALIZATION=1`",
        "sets it to 0 for vLLM's processes",
        "engines/test_server.py::test_pickle_over_the_wire_stays_off_whatever_the_environment_says",
    ),
    Fault(
        "The run is killed",
        "SIGKILL the process that owns an engine",
        "the engine's processes, files and sockets disappear",
        "engines/test_lifecycle.py::test_a_killed_owner_takes_its_engine_along",
    ),
    Fault(
        "A run is interrupted after a checkpoint",
        "delete its last checkpoint and restart it",
        "ends like a run that was never interrupted",
        "engines/test_train.py::test_a_run_cut_off_after_a_checkpoint_ends_like_an_uninterrupted_one",
    ),
    Fault(
        "The scheduler preempts the run",
        "send SIGTERM during a step",
        "finishes the step, saves a checkpoint, exit 75",
        "engines/test_train.py::test_a_signal_stops_the_run_after_a_step_with_a_checkpoint",
    ),
    Fault(
        "The scheduler preempts a run that is still starting",
        "send SIGTERM before the first step",
        "shuts down, exit 75",
        "processes/test_signals.py::test_a_stop_signal_while_a_run_is_built_takes_down_what_there_is",
    ),
    Fault(
        "The scheduler preempts a run that is still validating settings",
        "send SIGUSR1 before the run handles signals",
        "shuts down, exit 75",
        "processes/test_signals.py::test_a_command_that_nobody_listens_in_is_stopped_in_order",
    ),
    Fault(
        "vLLM mistakes an interrupt for a failure",
        "turn SIGINT and SIGTERM into another error, or swallow them",
        "the run stops as requested",
        "processes/test_signals.py::test_a_library_that_swallows_an_interrupt_does_not_keep_it",
    ),
    Fault(
        "The scheduler sends the signal twice",
        "send SIGTERM again while engine and rewards shut down",
        "completes the shutdown and keeps the exit code: 75, or 3 for a push that is not proven",
        "processes/test_signals.py::test_further_stop_signals_do_not_disturb_the_end_of_a_run",
    ),
    Fault(
        "A sweep is stopped",
        "send SIGTERM and SIGUSR1 to the sweep",
        "stops its job with a checkpoint, starts no other, exit 75",
        "command/test_config.py::test_a_signal_reaches_the_job_and_ends_the_sweep",
    ),
    Fault(
        "The terminal of a sweep closes",
        "send SIGHUP to a sweep and its job under nohup",
        "all jobs finish",
        "command/test_config.py::test_a_sweep_under_nohup_outlives_its_terminal",
    ),
    Fault(
        "A sweep's directory belongs to another sweep",
        "run another grid in the directory of a finished sweep",
        "exit 2 for the job; the table shows nothing of the older run",
        "command/test_config.py::test_a_job_that_was_refused_shows_nothing_of_the_run_whose_directory_it_was_given",
    ),
    Fault(
        "A job of a sweep fails",
        "make one of four exit with 3",
        "runs the others; the table shows which failed and how",
        "command/test_config.py::test_a_sweep_runs_each_job_in_a_process_and_outlives_a_failure",
    ),
    Fault(
        "The reader of the output exits",
        "close the pipe, as `| head` does",
        "continues the run",
        "records/test_monitor.py::test_a_reader_that_leaves_does_not_end_the_run",
    ),
    Fault(
        "An earlier run died",
        "leave its published weights in /dev/shm",
        "deletes them; keeps those of live runs",
        "training/test_trainer.py::test_only_what_dead_runs_left_behind_is_swept",
    ),
    Fault(
        "A bug in rlswitch",
        "raise an unexpected exception",
        "prints the traceback, exit 1",
        "command/test_config.py::test_a_crash_leaves_its_traceback_and_full_error_any_traceback",
    ),
]

LOST = [
    Fault(
        "The engine is killed while it generates",
        "SIGKILL vLLM's worker after 12 forward passes, in process and over HTTP",
        "restarts the engine, pushes and proves the weights; the rollouts are the same, bit for bit",
        "engines/test_lost.py::test_a_killed_engine_is_replaced_and_nobody_can_tell",
    ),
    Fault(
        "The engine dies after answering some requests",
        "SIGKILL it when some requests are finished and some are not",
        "repeats only the unfinished ones, with the same seeds",
        "engines/test_lost.py::test_only_what_was_not_finished_is_asked_again",
    ),
    Fault(
        "The engine dies during a push",
        "kill it in each verb of a push",
        "restarts the engine and the push",
        "switch/test_switch.py::test_an_engine_lost_in_a_push_is_pushed_to_again_and_proven",
    ),
    Fault(
        "The engine dies while going to sleep",
        "kill it in its sleep",
        "continues training; restarts the engine when it is needed",
        "switch/test_switch.py::test_an_engine_lost_in_its_sleep_is_missed_when_it_is_needed",
    ),
    Fault(
        "The engine hangs",
        "SIGSTOP vLLM's worker",
        "kills and restarts the engine after `engine.request_timeout_s`",
        "engines/test_lost.py::test_a_silent_engine_counts_as_lost",
    ),
    Fault(
        "The engine hangs during its start",
        "let its worker never finish loading, in process and over HTTP",
        "gives up after `engine.start_timeout_s`; kills worker and engine core",
        "engines/test_lost.py::test_an_engine_that_hangs_while_it_starts_is_given_up",
    ),
    Fault(
        "A step has more tokens than vLLM takes at once",
        "sample 6,000 prompt tokens on a CPU, where splitting a prompt kills vLLM",
        "never splits a prompt; nothing is lost",
        "engines/test_lost.py::test_a_step_may_have_more_tokens_than_vllm_takes_at_once",
    ),
    Fault(
        "The engine dies after its first push was proven",
        "switch.verify=first",
        "proves the first push of the new engine too",
        "switch/test_switch.py::test_an_engine_that_was_started_again_proves_its_first_push_again",
    ),
    Fault(
        "A server that rlswitch did not launch restarts",
        "start another one at the same address",
        "discards its answers, pushes, proves, repeats the requests",
        "engines/test_server_engine.py::test_what_a_server_says_that_was_started_again_meanwhile_is_not_taken",
    ),
    Fault(
        "The engine cannot be restarted",
        "name a worker class that does not exist",
        "exit 1 after `engine.max_restarts` attempts in a row, with the reason and the end of the log",
        "engines/test_lost.py::test_an_engine_that_never_comes_back_ends_the_run_with_its_log",
    ),
    Fault(
        "A judge's engine dies",
        "kill it while it generates",
        "restarts it and proves its own checkpoint again",
        "switch/test_switch.py::test_a_frozen_engine_that_is_lost_proves_its_checkpoint_again",
    ),
    Fault(
        "One of many requests fails",
        "answer HTTP 500 to one of three requests",
        "EngineError; keeps the answers that arrived",
        "engines/test_server.py::test_what_came_before_a_failure_is_not_lost",
    ),
    Fault(
        "The fork server is killed",
        "SIGKILL it",
        "its processes survive and start another when they need one",
        "engines/test_forkserver.py::test_a_process_outlives_its_server_and_starts_another",
    ),
    Fault(
        "The run is killed in any phase of a step",
        "SIGKILL in each of twelve phases of twelve steps",
        "the restarted run ends with the same records and tensors, byte for byte",
        "engines/test_killed.py::test_a_run_killed_in_every_phase_ends_like_one_that_never_was",
    ),
]

NUMBERS = [
    Fault(
        "A value in a batch is NaN or infinite",
        "put NaN or infinity into log-probabilities, rewards, advantages, values or returns",
        "skips the step's update, says why in one line, writes its rollouts to `skipped/`",
        "training/test_trainer.py::test_a_batch_that_is_not_finite_is_as_if_it_had_not_been",
    ),
    Fault(
        "The engine returns a NaN log-probability",
        "put NaN into one rollout",
        "accepts the rollout; the trainer skips the update",
        "switch/test_switch.py::test_a_log_probability_that_is_no_number_is_the_trainers_to_leave_out",
    ),
    Fault(
        "A gradient is NaN or infinite",
        "put NaN and infinity into one of three minibatches",
        "skips that optimizer step, counts it in `actor/skipped_updates`, applies the others",
        "training/test_trainer.py::test_an_optimizer_step_that_is_not_finite_is_left_out_alone",
    ),
    Fault(
        "The critic's gradient is NaN",
        "put NaN into it",
        "skips the policy's update too",
        "training/test_trainer.py::test_a_broken_critic_stops_the_policys_update_too",
    ),
    Fault(
        "Three steps in a row skip updates",
        "put NaN into the gradients",
        "exit 1, with the last good checkpoint and the rollouts' location",
        "records/test_health.py::test_three_in_a_row_end_the_run_and_a_good_one_between_them_does_not",
    ),
    Fault(
        "All rewards are equal, step after step",
        "run only steps whose gradient is 0",
        "warns after 10 in a row and says where to look; after 50 saves and stops, exit 1",
        "records/test_health.py::test_steps_without_a_gradient_are_told_once_and_end_the_run_in_the_end",
    ),
    Fault(
        "The forward pass runs out of memory",
        "raise out-of-memory above 30 tokens",
        "halves the micro-batches until they fit and keeps them that size; the update is the same",
        "training/test_trainer.py::test_what_does_not_fit_is_done_in_smaller_parts_with_the_same_result",
    ),
    Fault(
        "The backward pass runs out of memory",
        "raise out-of-memory after some gradients were accumulated",
        "restarts the minibatch with smaller micro-batches; the update is the same",
        "training/test_trainer.py::test_memory_that_runs_out_in_the_backward_pass_loses_no_gradient",
    ),
    Fault(
        "The optimizer's step runs out of memory",
        "raise out-of-memory while it allocates its states",
        "retries once, with the same result; if that fails too, exit 1 with one line",
        "training/test_trainer.py::test_memory_that_runs_out_for_the_optimizer_is_tried_again_once",
    ),
    Fault(
        "All rewards of a minibatch are equal while the optimizer has momentum",
        "run such a step after one that learned",
        "leaves the policy unchanged; the critic learns",
        "training/test_trainer.py::test_equal_rewards_move_the_critic_and_not_the_policy",
    ),
    Fault(
        "A rollout is lost while each is its own minibatch",
        "set as many minibatches as rollouts and drop one reward",
        "runs one minibatch less",
        "training/test_trainer.py::test_as_many_minibatches_as_rollouts_lose_one_with_the_rollout",
    ),
    Fault(
        "One rollout does not fit into memory",
        "raise out-of-memory for micro-batches of one",
        "exit 1 with the settings that help; the policy is unchanged",
        "training/test_trainer.py::test_a_rollout_that_does_not_fit_alone_ends_the_run_and_says_what_to_set",
    ),
    Fault(
        "All rewards are equal",
        "make them equal in every group",
        "leaves the policy unchanged to the last bit; nothing is divided by zero",
        "training/test_trainer.py::test_equal_rewards_leave_the_policy_as_it_is",
    ),
    Fault(
        "Packed rollouts see each other",
        "use a model that ignores where a rollout begins",
        "exit 2: set trainer.packing=false",
        "training/test_packing.py::test_a_model_whose_packed_rollouts_see_each_other_is_refused",
    ),
    Fault(
        "Metrics are NaN or infinite",
        "log NaN and infinity",
        "the JSON stays valid; the step's record names them",
        "records/test_monitor.py::test_non_finite_metrics_keep_the_json_valid_and_are_noted",
    ),
]

FILES = [
    *(
        Fault(
            f"A checkpoint is {damage}",
            "each kind of file in it, in turn",
            "names the damaged file and resumes from the previous checkpoint",
            f"checkpoint/test_checkpoint.py::test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken[{damage}]",
        )
        for damage in ("truncated", "flipped", "missing")
    ),
    Fault(
        "A finished run is restarted with other settings",
        "change the seed or the model",
        "exit 2 with the changes, as for an unfinished run",
        "checkpoint/test_resume.py::test_a_finished_run_is_said_to_be_complete_only_as_the_run_that_it_was",
    ),
    Fault(
        "A run goes back to an earlier checkpoint and is killed before its next save",
        "interrupt the removal of later checkpoints after the first",
        "never resumes from a later checkpoint",
        "checkpoint/test_resume.py::test_giving_up_that_is_broken_off_leaves_the_run_cut_back",
    ),
    Fault(
        "A branch of one run goes into another run's directory",
        "set resume=PATH of run A and output_dir of run B, which has checkpoints",
        "exit 2: run B's checkpoints would be lost",
        "checkpoint/test_resume.py::test_a_branch_of_another_run_is_a_run_of_its_own",
    ),
    Fault(
        "The clock changes while a run has its weights in shared memory",
        "change the owner's apparent start time",
        "other runs keep them, because they are locked",
        "training/test_trainer.py::test_a_run_that_seems_dead_from_here_keeps_its_weights_while_it_lives",
    ),
    Fault(
        "A bit of a checkpoint flips",
        "flip a bit in any byte",
        "detects it",
        "checkpoint/test_checkpoint.py::test_a_flipped_bit_in_any_byte_is_found",
    ),
    Fault(
        "The disk fills up during a save",
        "fail each system call of the save",
        "raises the error; the previous checkpoint is intact and is used",
        "checkpoint/test_interrupted_save.py::test_a_save_broken_off_anywhere_leaves_the_old_checkpoint_or_the_new_one",
    ),
    Fault(
        "A save was interrupted",
        "leave its draft",
        "never uses it as a checkpoint; deletes it at the next start",
        "checkpoint/test_checkpoint.py::test_the_next_start_removes_what_an_interrupted_save_has_left",
    ),
    Fault(
        "The last record is torn",
        "end metrics.jsonl with half a record",
        "drops it and all records after the checkpoint",
        "records/test_monitor.py::test_trim_drops_later_records_and_torn_lines_only",
    ),
    Fault(
        "A run's files are incomplete",
        "delete any of them before the report is made",
        "the report lacks only that section",
        "report/test_report.py::test_a_missing_file_costs_its_own_section_only",
    ),
    Fault(
        "A warm start is interrupted",
        "interrupt the training of the built-in model",
        "leaves nothing; the next run trains it again",
        "recipes/test_addition.py::test_a_warm_start_that_breaks_off_leaves_nothing",
    ),
    Fault(
        "A run's texts contain markup",
        "put tags into prompts and completions",
        "the report shows them as text",
        "report/test_report.py::test_nothing_in_a_run_can_write_markup",
    ),
    Fault(
        "There are secrets in the environment",
        "put keys into settings, environment and command",
        "config.yaml contains none",
        "records/test_monitor.py::test_config_tells_settings_and_versions_but_no_secret",
    ),
]

CRIME = "rewards/test_reward_failures.py::test_the_guilty_row_is_named_and_the_others_are_kept"
PROGRAM = "rewards/test_sandbox.py::test_what_a_program_does_wrong_is_named"
OUTSIDE = "rewards/test_sandbox.py::test_an_isolated_program_reaches_nothing_outside"

REWARDS = [
    *(
        Fault(
            f"A reward function {crime}",
            "for one completion of twenty",
            "drops that row with the reason and keeps all others; replaces the worker if it died",
            f"{CRIME}[{crime}]",
        )
        for crime in (
            "raises",
            "exits",
            "ends its process",
            "crashes",
            "loops",
            "waits where no exception reaches it",
            "eats memory",
            "prints a gigabyte",
            "forks and lets the child return",
            "returns nothing",
            "returns too few",
        )
    ),
    Fault(
        "A reward is not a finite number",
        "return NaN, infinity, text, a list, an exception, 10**400",
        "drops its row and shows the value",
        "rewards/test_reward_failures.py::test_what_is_no_number_costs_its_own_row_only",
    ),
    Fault(
        "A reward function always hangs",
        "hang on every row",
        "stops within the time budget",
        "rewards/test_reward_failures.py::test_a_function_that_always_hangs_stops_the_run_within_its_budget",
    ),
    Fault(
        "Too many rows have no reward",
        "fail more than reward.max_error_rate",
        "RewardError; the rollouts are unchanged",
        "rewards/test_reward_failures.py::test_more_errors_than_allowed_stop_the_run_and_change_nothing",
    ),
    Fault(
        "Every row of a refill has no reward",
        "fail every rollout of the one extra group that dynamic sampling requests",
        "continues, within reward.max_error_rate",
        "rewards/test_reward_failures.py::test_a_refill_may_fail_whole_within_what_the_step_allows",
    ),
    Fault(
        "A reward overflows float32",
        "return 1e39",
        "drops its row and shows the value",
        "rewards/test_reward_failures.py::test_numbers_that_training_could_not_hold_are_none",
    ),
    Fault(
        "Concurrent programs start many threads",
        "run four at once, as root",
        "each has its own limit",
        "rewards/test_sandbox.py::test_programs_side_by_side_do_not_share_one_limit_on_processes",
    ),
    Fault(
        "No row has a reward",
        "fail every row, at any reward.max_error_rate",
        "RewardError: nothing to train on",
        "rewards/test_reward_failures.py::test_no_rollout_left_is_an_error_whatever_the_rate",
    ),
    Fault(
        "A reward function leaves processes behind",
        "start children that outlive it",
        "kills them with its worker",
        "rewards/test_reward_failures.py::test_processes_that_a_function_leaves_behind_are_ended_with_it",
    ),
    Fault(
        "The trainer is killed while rewards are computed",
        "SIGKILL it",
        "the workers exit too",
        "rewards/test_reward_failures.py::test_a_killed_trainer_takes_its_workers_along",
    ),
    Fault(
        "A signal reaches all processes of the job",
        "send SIGTERM and SIGUSR1 to the workers too",
        "loses no row",
        "rewards/test_reward_failures.py::test_a_signal_to_every_process_of_the_job_loses_no_row",
    ),
    Fault(
        "A reward worker dies between two steps",
        "kill it",
        "replaces it; loses no row",
        "rewards/test_reward_failures.py::test_a_worker_that_dies_between_two_steps_loses_no_row",
    ),
    *(
        Fault(f"A model-written program {does}", injected, f"kills it; no points: `{says}`", PROGRAM)
        for does, injected, says in (
            ("never ends", "`while True`, all signals blocked", "ran longer than 1 s"),
            ("sleeps", "1000 s", "did not end within 3 s"),
            ("takes memory", "16 GiB", "MemoryError"),
            ("prints for ever", "in a loop", "printed more than 1048576 bytes"),
            ("fills the disk", "a file of 16 MiB", "File too large"),
            ("opens files", "99 of them", "Too many open files"),
        )
    ),
    *(
        Fault(f"A model-written program {does}", injected, f"the sandbox blocks it: `{says}`", OUTSIDE)
        for does, injected, says in (
            ("uses the network", "connect to 1.1.1.1", "unreachable"),
            ("signals the trainer", "`os.kill`", "ProcessLookupError"),
            ("reads the trainer's secrets", "/proc/PID/environ", "FileNotFoundError"),
            ("writes to the system", "a file in /usr", "Read-only file system"),
            ("is a fork bomb", "`while True: os.fork()`", "BlockingIOError"),
        )
    ),
    Fault(
        "A judge or reward model gives no score",
        "for one completion of several",
        "drops that row with the reason, as for a function; keeps all others",
        "rewards/test_tenants.py::test_a_model_without_an_answer_is_an_error_like_a_functions",
    ),
    Fault(
        "The judge replies without a score",
        "reply with gibberish every time",
        "drops the row and shows the reply; never makes up a score",
        "rewards/test_judge.py::test_after_the_last_retry_it_is_an_error_and_never_a_number",
    ),
    Fault(
        "A prompt is longer than the judge's context",
        "use one such completion among several",
        "drops the row; never truncates or sends it",
        "rewards/test_judge.py::test_a_question_that_has_no_room_is_not_cut_but_an_error",
    ),
    Fault(
        "A completion is longer than the reward model's context",
        "use one such completion among others",
        "drops the row; never truncates it",
        "rewards/test_reward_model.py::test_what_does_not_fit_its_context_is_an_error_and_not_cut",
    ),
    Fault(
        "The reward model's logit is NaN",
        "put NaN into its head",
        "drops its rows with the reason",
        "rewards/test_reward_model.py::test_a_score_that_is_no_number_is_an_error",
    ),
    Fault(
        "The reward model changes on disk",
        "change its head while others have the device, at level 2",
        "exit 3: `fingerprint`, `tensors differ: NAME`",
        "rewards/test_reward_model.py::test_a_file_that_changed_meanwhile_is_refused",
    ),
    Fault(
        "The reward model changes in memory",
        "change its head while others have the device, at level 1",
        "exit 3: `fingerprint`, `tensors differ: NAME`",
        "rewards/test_reward_model.py::test_weights_that_changed_in_host_memory_are_refused",
    ),
    Fault(
        "The reward model has no head",
        "remove the head from its files",
        "exit 2: its scores would be random",
        "rewards/test_reward_model.py::test_a_checkpoint_without_its_head_is_refused",
    ),
    Fault(
        "The kernel cannot isolate programs",
        "disable namespaces",
        "exit 2, unless reward.allow_unsandboxed=true",
        "rewards/test_sandbox.py::test_the_code_reward_refuses_to_run_without_isolation",
    ),
]

OUTSIDERS = [
    Fault(
        "A tracker (W&B, TensorBoard) raises",
        "raise in any of its calls, also SystemExit",
        "warns once and continues without it, and with the other trackers",
        "records/test_monitor.py::test_the_first_failure_drops_a_tracker_and_leaves_the_others",
    ),
    Fault(
        "W&B has no key",
        "resume an offline run",
        "continues the same W&B run on disk",
        "records/test_monitor.py::test_offline_wandb_goes_on_in_the_same_run_after_a_resume",
    ),
    Fault(
        "A package is built for another torch",
        "install a CUDA torchvision beside a CPU torch",
        "set-up names the command that removes it, before the import crashes",
        "command/test_environment.py::test_a_companion_is_built_for_the_same_cuda",
    ),
]

SECTIONS = {
    "Pushes": PUSHES,
    "Orders and hand-overs": ORDER,
    "The engine's answers": ENGINE,
    "Processes and signals": PROCESSES,
    "Engines and runs that die": LOST,
    "Numbers": NUMBERS,
    "Disk and files": FILES,
    "Rewards and programs": REWARDS,
    "Trackers and packages": OUTSIDERS,
}
FAULTS = [fault for faults in SECTIONS.values() for fault in faults]
