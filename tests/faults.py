"""Every fault that is injected: how, what rlswitch does then, and the test that shows it.

tests/test_faults.py asserts that the tests exist; scripts/fault_pages.py makes docs/faults.md of them.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    about: str
    injected: str
    does: str
    test: str
    """FILE::FUNCTION below tests/, with [CASE] where it is one case of several."""


PUSHES = [
    Fault(
        "Weights are not loaded",
        "vLLM's reload without a path: it loads its first checkpoint again",
        "exit 3: `fingerprint`, the engine loaded something else than what was published",
        "engine/test_sabotage.py::test_reload_without_a_path",
    ),
    Fault(
        "Weights of an older version",
        "the reload is sent to the version before",
        "exit 3: `fingerprint`",
        "engine/test_sabotage.py::test_reload_of_an_old_versions_path",
    ),
    Fault(
        "A tiny update is lost",
        "an old version whose log-probabilities differ by less than the canary bounds",
        "exit 3: `fingerprint`",
        "engine/test_sabotage.py::test_an_update_too_small_for_logprobs_to_show",
    ),
    Fault(
        "A tensor is missing",
        "one tensor taken out of the published file",
        "exit 3: `fingerprint`, `tensors missing: NAME`",
        "engine/test_sabotage.py::test_one_tensor_missing",
    ),
    Fault(
        "A tensor of another shape",
        "one tensor cut short in the published file",
        "exit 3: `reload`, the files are not what was published",
        "engine/test_sabotage.py::test_one_tensor_cut_short",
    ),
    Fault(
        "A tensor is written in part",
        "its last row is zero",
        "exit 3: `fingerprint`, `tensors differ: NAME`",
        "engine/test_sabotage.py::test_the_end_of_one_tensor_not_written",
    ),
    Fault(
        "One bit is flipped",
        "in the published file",
        "exit 3: `fingerprint`, `tensors differ: NAME`, the files are to blame",
        "engine/test_sabotage.py::test_one_bit_flipped",
    ),
    Fault(
        "The right bytes in the wrong place",
        "q and k exchanged, which no sum can see",
        "exit 3: `canary`",
        "engine/test_sabotage.py::test_q_and_k_exchanged",
    ),
    Fault(
        "A tied head stays behind",
        "what vLLM's CPU build does by itself",
        "exit 3: `canary`",
        "engine/test_sabotage.py::test_tied_head_left_stale",
    ),
    Fault(
        "Cached prefixes of older weights",
        "the prefix cache is not reset after a push",
        "exit 3: `prefix cache`, with the number of tokens that would have been answered from it",
        "engine/test_sabotage.py::test_prefix_cache_not_reset_across_a_push",
    ),
    Fault(
        "The reset is refused",
        "`reset_prefix_cache` answers false",
        "EngineError; nothing is generated",
        "test_switch.py::test_a_push_that_is_not_proven_never_generates",
    ),
    Fault(
        "Tensors that nobody published",
        "the engine reports one more",
        "ProofError that names it",
        "test_proof.py::test_an_extra_tensor_is_named",
    ),
    Fault(
        "Nothing was loaded at all",
        "an empty report",
        "ProofError that says so",
        "test_proof.py::test_nothing_loaded_is_said",
    ),
    Fault(
        "One worker of several is wrong",
        "one report differs",
        "ProofError that names the worker",
        "test_proof.py::test_the_worker_at_fault_is_named",
    ),
    Fault(
        "Received is not held",
        "live parameters other than those received",
        "ProofError",
        "test_proof.py::test_live_parameters_that_differ_from_what_was_received_are_refused",
    ),
    Fault(
        "Published files change",
        "a tensor changed, or the files gone, after publishing",
        "ProofError that blames the files, not the engine",
        "test_proof.py::test_changed_files_are_blamed",
    ),
    Fault(
        "Log-probabilities drift",
        "the canary differs by 0.2",
        "ProofError with sequence, token and gap",
        "test_proof.py::test_the_canary_names_the_token_with_the_largest_gap",
    ),
    Fault(
        "Log-probabilities are no numbers",
        "NaN and infinities, on one side and on both",
        "ProofError at any tolerance",
        "test_proof.py::test_a_canary_that_is_not_finite_is_refused_at_any_tolerance",
    ),
    Fault(
        "The first push teaches a bad tolerance",
        "its gap is above the ceiling",
        "ProofError; nothing is learnt from it",
        "test_proof.py::test_a_first_gap_above_the_ceiling_is_refused_and_teaches_nothing",
    ),
    Fault(
        "Weights change while asleep",
        "at level 1, where they should come back by themselves",
        "ProofError: `canary`",
        "test_switch.py::test_weights_that_changed_while_asleep_at_level_1_are_found_out",
    ),
    Fault(
        "A frozen checkpoint changes on disk",
        "one of its tensors",
        "ProofError that names it; it is not served",
        "engine/test_frozen.py::test_a_checkpoint_that_changes_on_disk_is_not_served",
    ),
    Fault(
        "A push of a whole run",
        "it is spoilt",
        "exit 3 before any rollout, with the check that failed",
        "engine/test_train.py::test_a_push_that_cannot_be_proven_stops_the_run_with_exit_3",
    ),
]

ORDER = [
    Fault(
        "Generating while asleep",
        "`generate` on the real vLLM, asleep, half awake and not proven",
        "SwitchError at once; vLLM is not touched",
        "engine/test_contract.py::test_generating_while_asleep_or_half_awake_raises_at_once",
    ),
    Fault(
        "Verbs in a wrong order",
        "every verb in every state of the engine",
        "SwitchError with the state; vLLM is not touched, and the engine stays usable",
        "test_switch.py::test_a_verb_works_in_its_state_and_in_every_other_raises_without_touching_vllm",
    ),
    Fault(
        "Awake without weights",
        "the KV cache is woken before a reload",
        "SwitchError",
        "test_switch.py::test_the_kv_cache_is_not_woken_before_the_weights_mean_something",
    ),
    Fault(
        "Generating before any push",
        "a fresh engine with its own checkpoint",
        "SwitchError: it has no published weights to serve",
        "test_switch.py::test_a_fresh_engine_does_not_generate_from_its_own_checkpoint",
    ),
    Fault(
        "Two sleeps",
        "the engine is asked to let go twice",
        "it sleeps once",
        "test_switch.py::test_letting_go_twice_sleeps_once",
    ),
    Fault(
        "A sleep that frees nothing",
        "the real vLLM keeps its memory",
        "SwitchError with the GiB expected and found; the trainer does not start",
        "engine/test_contract.py::test_a_sleep_that_frees_nothing_is_reported",
    ),
    Fault(
        "A device that is not given back",
        "free memory stays as it was",
        "SwitchError with who holds it",
        "test_switch.py::test_a_device_that_is_not_given_back_stops_the_hand_over",
    ),
    Fault(
        "Letting go fails",
        "`release` raises",
        "the device is not passed on",
        "test_switch.py::test_a_release_that_fails_does_not_pass_the_device_on",
    ),
    Fault(
        "A push breaks half-way",
        "each of its verbs raises once",
        "the engine has failed for good: every later verb raises SwitchError",
        "test_switch.py::test_a_verb_that_fails_half_way_fails_the_engine_for_good",
    ),
    Fault(
        "Rollouts of another version",
        "rollouts of an older and a newer policy",
        "the trainer refuses them, with prompt and versions",
        "test_trainer.py::test_rollouts_of_another_version_are_refused",
    ),
]

ENGINE = [
    *(
        Fault(
            about,
            injected,
            "EngineError with the prompt and the sample; nothing is padded",
            "test_switch.py::test_an_answer_that_is_not_a_rollout_is_refused",
        )
        for about, injected in (
            ("Too few completions", "3 for 4 requests"),
            ("An empty completion", "no token comes back"),
            ("Log-probabilities are missing", "one for two tokens"),
        )
    ),
    Fault(
        "The server is silent",
        "it takes a request and never answers",
        "EngineError after `engine.request_timeout_s`, which names it",
        "test_server.py::test_a_silent_server_is_given_up",
    ),
    Fault(
        "The server answers 500, or is not there",
        "both",
        "EngineError with its address and its reason",
        "test_server.py::test_errors_name_the_server_and_repeat_its_reason",
    ),
    Fault(
        "The server sends us elsewhere",
        "a redirect",
        "EngineError; the other address is never asked",
        "test_server.py::test_a_redirect_leads_nowhere",
    ),
    Fault(
        "A server that is not fit",
        "its control endpoints are off",
        "exit 2, with the command that starts a fit one",
        "test_server.py::test_an_unfit_server_is_refused_with_the_command_that_starts_a_fit_one",
    ),
    Fault(
        "Two runs on one server",
        "a second one attaches",
        "exit 2: each would generate from the other's weights",
        "test_server.py::test_one_run_at_a_time_is_attached_to_a_server",
    ),
    Fault(
        "A server that hides cached tokens",
        "it is started without `--enable-prompt-tokens-details`",
        "EngineError that names the flag",
        "engine/test_server_engine.py::test_a_server_that_does_not_tell_cached_tokens_is_refused",
    ),
    Fault(
        "vLLM does not start",
        "a flag that it does not know",
        "EngineError with the end of its log; no process, no file is left",
        "engine/test_server_engine.py::test_a_failed_start_says_why_and_leaves_nothing",
    ),
    Fault(
        "Others reach the socket",
        "the rights of the launched server's socket",
        "its directory is the user's alone",
        "engine/test_server_engine.py::test_only_we_reach_the_socket",
    ),
]

PROCESSES = [
    Fault(
        "torch, transformers or vLLM cannot be imported",
        "a companion is built for another torch",
        "exit 2 with the reason in one line, and how to reinstall",
        "test_environment.py::test_a_torch_that_cannot_be_imported_is_one_line",
    ),
    Fault(
        "The run is told to stop in the middle of its rollouts",
        "SIGTERM",
        "they are given up, the step before is saved, exit 75; going on it ends with the same bytes",
        "engine/test_killed.py::test_a_run_killed_in_every_phase_ends_like_one_that_never_was",
    ),
    Fault(
        "The environment allows pickle over the wire",
        "`VLLM_ALLOW_INSECURE_SERIALIZATION=1`",
        "vLLM's processes get 0",
        "test_server.py::test_pickle_over_the_wire_stays_off_whatever_the_environment_says",
    ),
    Fault(
        "The run is killed",
        "SIGKILL to the process that owns an engine",
        "every process of the engine, its files and sockets are gone",
        "engine/test_lifecycle.py::test_a_killed_owner_takes_its_engine_along",
    ),
    Fault(
        "A run is cut off after a checkpoint",
        "its last checkpoint is taken away, and it is started again",
        "it ends like one that was never interrupted",
        "engine/test_train.py::test_a_run_cut_off_after_a_checkpoint_ends_like_an_uninterrupted_one",
    ),
    Fault(
        "The scheduler takes the machine",
        "SIGTERM during a step",
        "the step ends, a checkpoint is saved, exit 75",
        "engine/test_train.py::test_a_signal_stops_the_run_after_a_step_with_a_checkpoint",
    ),
    Fault(
        "The scheduler takes the machine while the run is built",
        "SIGTERM before the first step",
        "what there is is taken down, exit 75",
        "test_signals.py::test_a_stop_signal_while_a_run_is_built_takes_down_what_there_is",
    ),
    Fault(
        "The scheduler takes the machine while settings are looked at",
        "SIGUSR1 before anything listens",
        "what there is is taken down, exit 75",
        "test_signals.py::test_a_command_that_nobody_listens_in_is_stopped_in_order",
    ),
    Fault(
        "vLLM takes an interrupt for a failure of its own",
        "SIGINT and SIGTERM, turned into another error or into nothing",
        "the run ends as it was asked to",
        "test_signals.py::test_a_library_that_swallows_an_interrupt_does_not_keep_it",
    ),
    Fault(
        "The scheduler asks twice",
        "another SIGTERM while engine and rewards are taken down",
        "they are taken down in order, with the exit code that there was: 75, or 3 for a push not proven",
        "test_signals.py::test_further_stop_signals_do_not_disturb_the_end_of_a_run",
    ),
    Fault(
        "A sweep is stopped",
        "SIGTERM and SIGUSR1 to the sweep",
        "its job stops with a checkpoint, no further one starts, exit 75",
        "test_config.py::test_a_signal_reaches_the_job_and_ends_the_sweep",
    ),
    Fault(
        "The terminal of a sweep is closed",
        "SIGHUP to the sweep and its job, which were started by nohup",
        "all jobs run to their ends",
        "test_config.py::test_a_sweep_under_nohup_outlives_its_terminal",
    ),
    Fault(
        "A job of a sweep is refused its directory",
        "another grid in the directory of a finished sweep",
        "exit 2 for the job; the table shows nothing of the run that is there",
        "test_config.py::test_a_job_that_was_refused_shows_nothing_of_the_run_whose_directory_it_was_given",
    ),
    Fault(
        "A job of a sweep fails",
        "one of four exits with 3",
        "the others run; the table says which failed and how",
        "test_config.py::test_a_sweep_runs_each_job_in_a_process_and_outlives_a_failure",
    ),
    Fault(
        "The reader of the output leaves",
        "a closed pipe, as `| head` makes",
        "the run goes on",
        "test_monitor.py::test_a_reader_that_leaves_does_not_end_the_run",
    ),
    Fault(
        "An earlier run died",
        "its published weights are left in /dev/shm",
        "they are removed; those of living runs stay",
        "test_trainer.py::test_only_what_dead_runs_left_behind_is_swept",
    ),
    Fault(
        "A crash of our own",
        "an exception that nobody expects",
        "its traceback, exit 1",
        "test_config.py::test_a_crash_leaves_its_traceback_and_full_error_any_traceback",
    ),
]

LOST = [
    Fault(
        "The engine is killed while it generates",
        "SIGKILL to vLLM's worker after 12 forward passes, in process and over HTTP",
        "another is started, pushed to and proven; the rollouts are the same, bit for bit",
        "engine/test_lost.py::test_a_killed_engine_is_replaced_and_nobody_can_tell",
    ),
    Fault(
        "The engine dies with half of its answers given",
        "SIGKILL when some requests are finished and some are not",
        "only those that are not are asked again, with the same seeds",
        "engine/test_lost.py::test_only_what_was_not_finished_is_asked_again",
    ),
    Fault(
        "The engine dies in a push",
        "lost in each verb of a push",
        "another is started and the push begins anew",
        "test_switch.py::test_an_engine_lost_in_a_push_is_pushed_to_again_and_proven",
    ),
    Fault(
        "The engine dies falling asleep",
        "lost in its sleep",
        "the trainer goes on; another engine is started when one is needed",
        "test_switch.py::test_an_engine_lost_in_its_sleep_is_missed_when_it_is_needed",
    ),
    Fault(
        "The engine hangs",
        "SIGSTOP to vLLM's worker",
        "after `engine.request_timeout_s` it is ended and replaced",
        "engine/test_lost.py::test_a_silent_engine_counts_as_lost",
    ),
    Fault(
        "The engine hangs while it starts",
        "its worker never gets its model loaded, in process and over HTTP",
        "after `engine.start_timeout_s` it is given up; neither worker nor engine core is left",
        "engine/test_lost.py::test_an_engine_that_hangs_while_it_starts_is_given_up",
    ),
    Fault(
        "More tokens than vLLM takes at once",
        "a step of 6,000 prompt tokens on a CPU, where a prompt in two parts would kill vLLM",
        "prompts are not taken apart; nothing is lost",
        "engine/test_lost.py::test_a_step_may_have_more_tokens_than_vllm_takes_at_once",
    ),
    Fault(
        "A first push is proven, and the engine then lost",
        "switch.verify=first",
        "the next engine proves its first push too",
        "test_switch.py::test_an_engine_that_was_started_again_proves_its_first_push_again",
    ),
    Fault(
        "A server that is not ours is started again",
        "another one answers at the same address",
        "what it says is not taken; it is pushed to, proven and asked anew",
        "engine/test_server_engine.py::test_what_a_server_says_that_was_started_again_meanwhile_is_not_taken",
    ),
    Fault(
        "The engine does not start again",
        "a worker class that is not there",
        "exit 1 after `engine.max_restarts` in a row, with the reason and the end of its log",
        "engine/test_lost.py::test_an_engine_that_never_comes_back_ends_the_run_with_its_log",
    ),
    Fault(
        "A judge's engine dies",
        "lost while it generates",
        "it goes back to its own checkpoint, and proves it again",
        "test_switch.py::test_a_frozen_engine_that_is_lost_proves_its_checkpoint_again",
    ),
    Fault(
        "One answer of many fails",
        "HTTP 500 for one of three requests",
        "EngineError; the answers that had come are kept",
        "test_server.py::test_what_came_before_a_failure_is_not_lost",
    ),
    Fault(
        "The fork server is killed",
        "SIGKILL",
        "its processes live on, and start another when they need one",
        "engine/test_forkserver.py::test_a_process_outlives_its_server_and_starts_another",
    ),
    Fault(
        "The run is killed in any phase of a step",
        "SIGKILL in each of twelve phases of twelve steps",
        "started again it ends with the same records and tensors, byte by byte",
        "engine/test_killed.py::test_a_run_killed_in_every_phase_ends_like_one_that_never_was",
    ),
]

NUMBERS = [
    Fault(
        "Something in a batch is no number",
        "a log-probability, reward, advantage, value or return that is NaN or infinite",
        "the step's update is left out to the last bit, one line says why, its rollouts go to `skipped/`",
        "test_trainer.py::test_a_batch_that_is_not_finite_is_as_if_it_had_not_been",
    ),
    Fault(
        "The engine's log-probability is no number",
        "NaN in one rollout",
        "it gets as far as the batch, whose update is left out",
        "test_switch.py::test_a_log_probability_that_is_no_number_is_the_trainers_to_leave_out",
    ),
    Fault(
        "A gradient is no number",
        "NaN and infinity in one of three minibatches",
        "that optimizer step is left out and counted in `actor/skipped_updates`, the others are made",
        "test_trainer.py::test_an_optimizer_step_that_is_not_finite_is_left_out_alone",
    ),
    Fault(
        "The critic breaks",
        "its gradient is NaN",
        "the policy's update is not applied either",
        "test_trainer.py::test_a_broken_critic_stops_the_policys_update_too",
    ),
    Fault(
        "Updates are left out in three steps in a row",
        "gradients that are NaN",
        "exit 1, with the last good checkpoint and where the rollouts are",
        "test_health.py::test_three_in_a_row_end_the_run_and_a_good_one_between_them_does_not",
    ),
    Fault(
        "Rewards never differ",
        "steps whose gradient is 0, and nothing else",
        "after 10 in a row a line says where to look, after 50 the run is saved and ends, exit 1",
        "test_health.py::test_steps_without_a_gradient_are_told_once_and_end_the_run_in_the_end",
    ),
    Fault(
        "Out of memory in the forward pass",
        "raised beyond 30 tokens",
        "micro-batches are halved until they fit, and stay so; the update is the same",
        "test_trainer.py::test_what_does_not_fit_is_done_in_smaller_parts_with_the_same_result",
    ),
    Fault(
        "Out of memory in the backward pass",
        "raised when gradients have been summed up already",
        "the minibatch begins anew with smaller micro-batches; the update is the same",
        "test_trainer.py::test_memory_that_runs_out_in_the_backward_pass_loses_no_gradient",
    ),
    Fault(
        "Out of memory in the optimizer's step",
        "raised when some of its states are made, and one is half made",
        "it is made once more, with the same result; out of memory again, the run ends with a line, exit 1",
        "test_trainer.py::test_memory_that_runs_out_for_the_optimizer_is_tried_again_once",
    ),
    Fault(
        "Rewards of a minibatch are all equal when there is momentum",
        "a step after one that learned",
        "the policy stays as it is, the critic learns",
        "test_trainer.py::test_equal_rewards_move_the_critic_and_not_the_policy",
    ),
    Fault(
        "A rollout is lost where each is a minibatch",
        "as many minibatches as rollouts, and one without a reward",
        "one minibatch less",
        "test_trainer.py::test_as_many_minibatches_as_rollouts_lose_one_with_the_rollout",
    ),
    Fault(
        "One rollout does not fit",
        "out of memory with micro-batches of one",
        "exit 1 with the settings that help; the policy is as it was",
        "test_trainer.py::test_a_rollout_that_does_not_fit_alone_ends_the_run_and_says_what_to_set",
    ),
    Fault(
        "Rewards are all equal",
        "every group",
        "the policy stays as it is to the last bit; nothing is divided by zero",
        "test_trainer.py::test_equal_rewards_leave_the_policy_as_it_is",
    ),
    Fault(
        "Packed rollouts see each other",
        "a model that does not tell where a rollout begins",
        "exit 2: set trainer.packing=false",
        "test_packing.py::test_a_model_whose_packed_rollouts_see_each_other_is_refused",
    ),
    Fault(
        "Metrics are no numbers",
        "NaN and infinities",
        "the JSON stays valid; the step's record says which",
        "test_monitor.py::test_non_finite_metrics_keep_the_json_valid_and_are_noted",
    ),
]

FILES = [
    *(
        Fault(
            f"A checkpoint is {damage}",
            "each kind of its files",
            "it is passed over with a line that names the file, and the one before is taken",
            f"test_checkpoint.py::test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken[{damage}]",
        )
        for damage in ("truncated", "flipped", "missing")
    ),
    Fault(
        "A finished run is started again with other settings",
        "another seed, another model",
        "exit 2, naming what changed, as for an unfinished one",
        "test_resume.py::test_a_finished_run_is_said_to_be_complete_only_as_the_run_that_it_was",
    ),
    Fault(
        "A run goes back to an earlier checkpoint and is killed before its next",
        "the removal of the later ones broken off after the first",
        "what is left is the run cut back: nothing later is ever gone on from",
        "test_resume.py::test_giving_up_that_is_broken_off_leaves_the_run_cut_back",
    ),
    Fault(
        "A branch of one run in the directory of another",
        "resume=PATH of run A, output_dir of run B, which has checkpoints",
        "exit 2: they would be lost",
        "test_resume.py::test_a_branch_of_another_run_is_a_run_of_its_own",
    ),
    Fault(
        "The clock is set while a run has its weights in shared memory",
        "its owner seems to be born at another time",
        "another run's start leaves them alone, for they are locked",
        "test_trainer.py::test_a_run_that_seems_dead_from_here_keeps_its_weights_while_it_lives",
    ),
    Fault(
        "A bit rots",
        "any bit of any byte of a checkpoint",
        "it is found",
        "test_checkpoint.py::test_a_flipped_bit_in_any_byte_is_found",
    ),
    Fault(
        "The disk is full while saving",
        "the save breaks off at each of its steps",
        "the error is raised; the checkpoint before is whole and is found",
        "test_interrupted_save.py::test_a_save_broken_off_anywhere_leaves_the_old_checkpoint_or_the_new_one",
    ),
    Fault(
        "A save was cut off",
        "its draft is left",
        "it is never taken for a checkpoint, and is removed",
        "test_checkpoint.py::test_the_next_start_removes_what_an_interrupted_save_has_left",
    ),
    Fault(
        "The last line is torn",
        "half a record at the end of metrics.jsonl",
        "it is dropped, and what came after the checkpoint too",
        "test_monitor.py::test_trim_drops_later_records_and_torn_lines_only",
    ),
    Fault(
        "A report of half a run",
        "any of its files is missing",
        "it lacks that section only",
        "test_report.py::test_a_missing_file_costs_its_own_section_only",
    ),
    Fault(
        "A warm start breaks off",
        "the built-in model is half made",
        "nothing is left; the next run makes it anew",
        "test_addition.py::test_a_warm_start_that_breaks_off_leaves_nothing",
    ),
    Fault(
        "A run writes markup",
        "tags in prompts and completions",
        "the report shows them as text",
        "test_report.py::test_nothing_in_a_run_can_write_markup",
    ),
    Fault(
        "Secrets in the environment",
        "keys in settings, environment and command",
        "config.yaml holds none",
        "test_monitor.py::test_config_tells_settings_and_versions_but_no_secret",
    ),
]

CRIME = "test_reward_failures.py::test_the_guilty_row_is_named_and_the_others_are_kept"
PROGRAM = "test_sandbox.py::test_what_a_program_does_wrong_is_named"
OUTSIDE = "test_sandbox.py::test_an_isolated_program_reaches_nothing_outside"

REWARDS = [
    *(
        Fault(
            f"A reward function {crime}",
            "on one completion of twenty",
            "its row has no reward and says why; all others keep theirs, the worker is replaced if it died",
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
        "A reward is no number",
        "NaN, infinity, text, a list, an exception, 10**400",
        "its row has no reward and says what came back",
        "test_reward_failures.py::test_what_is_no_number_costs_its_own_row_only",
    ),
    Fault(
        "A function always hangs",
        "on every row",
        "the run stops within its budget of time",
        "test_reward_failures.py::test_a_function_that_always_hangs_stops_the_run_within_its_budget",
    ),
    Fault(
        "Too many rows fail",
        "more than reward.max_error_rate",
        "RewardError; the rollouts are as they were",
        "test_reward_failures.py::test_more_errors_than_allowed_stop_the_run_and_change_nothing",
    ),
    Fault(
        "Every row of a refill fails",
        "dynamic sampling asks for one group more, of which no rollout has a reward",
        "the step goes on, within reward.max_error_rate",
        "test_reward_failures.py::test_a_refill_may_fail_whole_within_what_the_step_allows",
    ),
    Fault(
        "A reward is beyond float32",
        "1e39",
        "its row has no reward and says what came back",
        "test_reward_failures.py::test_numbers_that_training_could_not_hold_are_none",
    ),
    Fault(
        "Programs side by side start many threads",
        "four at once, as root",
        "each has a limit of its own",
        "test_sandbox.py::test_programs_side_by_side_do_not_share_one_limit_on_processes",
    ),
    Fault(
        "Every row fails",
        "whatever the rate",
        "RewardError: there is nothing to train on",
        "test_reward_failures.py::test_no_rollout_left_is_an_error_whatever_the_rate",
    ),
    Fault(
        "A function leaves processes behind",
        "children that outlive it",
        "they are ended with its worker",
        "test_reward_failures.py::test_processes_that_a_function_leaves_behind_are_ended_with_it",
    ),
    Fault(
        "The trainer is killed while rewards run",
        "SIGKILL",
        "the workers end too",
        "test_reward_failures.py::test_a_killed_trainer_takes_its_workers_along",
    ),
    Fault(
        "A signal to the whole job",
        "SIGTERM and SIGUSR1 to the workers too",
        "no row is lost",
        "test_reward_failures.py::test_a_signal_to_every_process_of_the_job_loses_no_row",
    ),
    Fault(
        "A worker dies between two steps",
        "it is killed",
        "another one takes its place; no row is lost",
        "test_reward_failures.py::test_a_worker_that_dies_between_two_steps_loses_no_row",
    ),
    *(
        Fault(f"A program {does}", injected, f"it is ended and has no points: `{says}`", PROGRAM)
        for does, injected, says in (
            ("never ends", "`while True`, with every signal blocked", "ran longer than 1 s"),
            ("sleeps", "1000 s", "did not end within 3 s"),
            ("takes memory", "16 GiB", "MemoryError"),
            ("prints for ever", "in a loop", "printed more than 1048576 bytes"),
            ("fills the disk", "a file of 16 MiB", "File too large"),
            ("opens files", "99 of them", "Too many open files"),
        )
    ),
    *(
        Fault(f"A program {does}", injected, f"it cannot: `{says}`", OUTSIDE)
        for does, injected, says in (
            ("calls the network", "a connection to 1.1.1.1", "unreachable"),
            ("signals the trainer", "`os.kill`", "ProcessLookupError"),
            ("reads the trainer's secrets", "/proc/PID/environ", "FileNotFoundError"),
            ("writes to the system", "a file in /usr", "Read-only file system"),
            ("is a fork bomb", "`while True: os.fork()`", "BlockingIOError"),
        )
    ),
    Fault(
        "A model among the rewards gives no score",
        "on one completion of several",
        "its row has no reward and says why, as with a function; all others keep theirs",
        "test_tenants.py::test_a_model_without_an_answer_is_an_error_like_a_functions",
    ),
    Fault(
        "The judge replies something else",
        "gibberish, however often it is asked",
        "its row has no reward and shows the reply; no score is made up",
        "test_judge.py::test_after_the_last_retry_it_is_an_error_and_never_a_number",
    ),
    Fault(
        "A question is longer than the judge's context",
        "one of several completions is",
        "its row has no reward; it is not cut and never asked",
        "test_judge.py::test_a_question_that_has_no_room_is_not_cut_but_an_error",
    ),
    Fault(
        "A completion is longer than the reward model's context",
        "one of several is",
        "its row has no reward; it is not cut",
        "test_reward_model.py::test_what_does_not_fit_its_context_is_an_error_and_not_cut",
    ),
    Fault(
        "The reward model's logit is no number",
        "its head is NaN",
        "its rows have no reward and say so",
        "test_reward_model.py::test_a_score_that_is_no_number_is_an_error",
    ),
    Fault(
        "The reward model changes on disk",
        "its head, while others have the device, at level 2",
        "exit 3: `fingerprint`, `tensors differ: NAME`",
        "test_reward_model.py::test_a_file_that_changed_meanwhile_is_refused",
    ),
    Fault(
        "The reward model changes in memory",
        "its head, while others have the device, at level 1",
        "exit 3: `fingerprint`, `tensors differ: NAME`",
        "test_reward_model.py::test_weights_that_changed_in_host_memory_are_refused",
    ),
    Fault(
        "The reward model has no head",
        "it is taken out of its files",
        "exit 2: its scores would be made up",
        "test_reward_model.py::test_a_checkpoint_without_its_head_is_refused",
    ),
    Fault(
        "A kernel without isolation",
        "no namespaces",
        "exit 2, unless reward.allow_unsandboxed says otherwise",
        "test_sandbox.py::test_the_code_reward_refuses_to_run_without_isolation",
    ),
]

OUTSIDERS = [
    Fault(
        "A tracker raises",
        "at each of its calls",
        "one warning; the run goes on without it",
        "test_monitor.py::test_a_tracker_that_raises_is_left_with_one_warning",
    ),
    Fault(
        "A tracker hangs",
        "in a call",
        "the run does not wait",
        "test_monitor.py::test_a_tracker_that_hangs_does_not_hold_the_run",
    ),
    Fault(
        "A tracker does not finish",
        "at the end",
        "it is given up with a warning",
        "test_monitor.py::test_a_slow_finish_is_given_up",
    ),
    Fault(
        "No key for W&B",
        "offline, and a resumed run",
        "the same W&B run goes on, on disk",
        "test_monitor.py::test_offline_wandb_goes_on_in_the_same_run_after_a_resume",
    ),
    Fault(
        "A companion of another torch",
        "a CUDA torchvision beside a CPU torch",
        "set-up names it and the command that removes it, before the import that would crash",
        "test_environment.py::test_a_companion_is_built_for_the_same_cuda",
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
    "What is not ours": OUTSIDERS,
}
FAULTS = [fault for faults in SECTIONS.values() for fault in faults]
