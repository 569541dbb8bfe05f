"""Known bugs, put back one at a time: the tests named for each must fail.

    python tests/mutants.py                    # all of them, two at a time
    python tests/mutants.py NAME ...           # only these

Each mutant is a small edit of the source: (file, old text, new text). It is applied to a copy, its
tests run there, and they have to fail by what they assert; a crash of the edit itself (a name that
does not exist, a file that cannot be imported) is no kill. A mutant that survives is a missing
test; one whose old text is not in its file exactly once no longer applies, and is an error too.
Prints a line for each and last `killed N/N`; exit status 1 unless every one was killed.
"""

import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROCESSES, TIMEOUT = 2, 240  # the timeout in seconds, for one mutant; all tests before them


class Mutant(NamedTuple):
    name: str
    file: str  # relative to the repository
    old: str  # stands there exactly once
    new: str
    tests: str  # pytest ids below tests/, separated by spaces: all run, one has to fail
    seen: str  # where this bug was found; "-" for a slip that is as easy, but has no public case


# --- the model, sampling, log-probabilities ------------------------------------------------------

MODEL = [
    Mutant("padded_vocabulary_rows", "model.py",
           "weight = self.wte.weight[:self.config.n_tokens]",
           "weight = self.wte.weight",
           "test_model.py::test_padded_vocabulary_rows_get_no_probability", "-"),
    Mutant("log_softmax_in_bf16", "model.py",
           "dtype = torch.promote_types(hidden.dtype, torch.float32)",
           "dtype = hidden.dtype",
           "test_model.py::test_log_probabilities_of_a_bf16_model_are_fp32",
           "autocast logits in bf16 make the KL noisy: transformers 31267"),
    Mutant("logits_rounded_by_autocast", "model.py",
           "with torch.autocast(hidden.device.type, enabled=False):", "with torch.no_grad():",
           "test_model.py::test_log_probabilities_under_autocast_are_fp32",
           "autocast around the head: an error of 0.033 nats a token at 135M parameters"),
    Mutant("cache_mask_off_by_one", "model.py",
           "mask = slots <= positions[:, None, :, None]",
           "mask = slots < positions[:, None, :, None]",
           "test_model.py::test_cache_equals_full_forward", "-"),
    Mutant("cache_position_off_by_one", "model.py",
           "cache, current[:, None])[:, 0]",
           "cache, current[:, None] + 1)[:, 0]",
           "test_model.py::test_greedy_with_mixed_lengths_equals_one_row_at_a_time",
           "TRL 469, 6800: positions that do not count a row's own tokens"),
    Mutant("positions_ignored", "model.py",
           "x = self.wte(tokens) + self.wpe(positions)",
           "x = self.wte(tokens) + self.wpe(torch.arange(T, device=tokens.device))",
           "test_model.py::test_cache_equals_full_forward",
           "TRL 6800 (online DPO, XPO, Nash), OpenRLHF 217: position ids not passed"),
    Mutant("first_token_from_the_last_column", "model.py",
           "last = hidden[torch.arange(len(prompts), device=device), start - 1]",
           "last = hidden[:, -1]",
           "test_model.py::test_greedy_with_mixed_lengths_equals_one_row_at_a_time",
           "alpaca-lora 315, TRL 2778: the last column of a padded batch"),
    Mutant("cache_rows_mixed_up", "model.py",
           "cache.kv[:, :, active]",
           "cache.kv[:, :, :len(active)]",
           "test_invariance.py::test_generation_of_many_rows_equals_one_row_at_a_time", "-"),
    Mutant("samples_tiled", "model.py",
           "cache.kv = cache.kv.repeat_interleave(samples, 2)",
           "cache.kv = cache.kv.repeat(1, 1, samples, 1, 1, 1)",
           "test_model.py::test_samples_of_a_prompt_are_those_of_the_repeated_prompt",
           "-"),
    Mutant("top_k_in_rollouts", "model.py",
           "p = F.softmax(logits / temperature, dim=-1)",
           "top = logits.topk(8).values[:, -1:]\n"
           "            p = F.softmax(logits.where(logits >= top, -torch.inf) / temperature, -1)",
           "test_model.py::test_samples_follow_the_tempered_softmax",
           "nanochat, minChatGPT, TRL 351, 925, 1161, 1857: KL below zero"),
    Mutant("minimum_length_in_rollouts", "model.py",
           "logits = model.logits(last)\n",
           "logits = model.logits(last)\n"
           "        logits[:, eos] = -torch.inf if step < 4 else logits[:, eos]\n",
           "test_model.py::test_samples_follow_the_tempered_softmax",
           "TRL 925: min_length in generate, unknown to the log-probabilities"),
    Mutant("no_temperature_in_sampling", "model.py",
           "p = F.softmax(logits / temperature, dim=-1)",
           "p = F.softmax(logits, dim=-1)",
           "test_model.py::test_samples_follow_the_tempered_softmax", "TRL 3169, OpenRLHF PR 853"),
    Mutant("one_random_number_for_the_batch", "model.py",
           "u = torch.rand(len(p), 1,", "u = torch.rand(1, 1,",
           "test_model.py::test_samples_follow_the_tempered_softmax", "-"),
    Mutant("no_temperature_in_log_probabilities", "model.py",
           "logp_all = F.log_softmax(model.logits(hidden) / temperature, dim=-1)",
           "logp_all = F.log_softmax(model.logits(hidden), dim=-1)",
           "test_model.py::test_token_logprobs_by_hand",
           "rlhf-book samples at 0.6, minimind at 0.8, both score at 1; TRL PR 3029"),
    Mutant("no_temperature_in_exact_kl_reference", "model.py",
           "ref_all = F.log_softmax(ref_model.logits(ref_hidden) / temperature, dim=-1)",
           "ref_all = F.log_softmax(ref_model.logits(ref_hidden), dim=-1)",
           "test_model.py::test_exact_kl_at_a_temperature", "TRL 3169, compose-rl PR 105"),
    Mutant("softmax_of_a_softmax", "model.py",
           "logp_all = F.log_softmax(model.logits(hidden) / temperature, dim=-1)",
           "logp_all = F.log_softmax(F.softmax(model.logits(hidden) / temperature, -1), dim=-1)",
           "test_model.py::test_token_logprobs_by_hand",
           "nanoChatGPT: cross-entropy of probabilities"),
    Mutant("log_probability_of_the_token_before", "model.py",
           "hidden = model(tokens[:, :-1])[predicts]",
           "hidden = model(tokens)[:, 1:][predicts]",
           "test_model.py::test_token_logprobs_by_hand", "a shift by one; cf. TRL 6819"),
    Mutant("exact_kl_reversed", "model.py",
           "kl = (logp_all.exp() * (logp_all - ref_all)).sum(-1)",
           "kl = (ref_all.exp() * (ref_all - logp_all)).sum(-1)",
           "test_model.py::test_entropy_and_exact_kl_by_hand",
           "minChatGPT, rlhf-book, trlx: KL(ref || pi) for KL(pi || ref)"),
    Mutant("entropy_of_the_sampled_token", "model.py",
           "entropies = -(logp_all.exp() * logp_all).sum(-1) if entropy else None",
           "entropies = -logp if entropy else None",
           "test_model.py::test_entropy_and_exact_kl_by_hand",
           "TRL 2022, 2281, 2496: entropy = mean of -logp"),
    Mutant("tokens_after_eos_count", "model.py",
           "position[rows] += ~done[rows]",
           "position[rows] += 1",
           "test_model.py::test_generate_stops_at_eos_and_pads_behind_it",
           "minChatGPT, nanoChatGPT: responses of a fixed length; TRL 6803"),
    Mutant("eos_not_in_the_response_mask", "model.py",
           "position[rows] += ~done[rows]\n        done[rows] |= token == eos",
           "done[rows] |= token == eos\n        position[rows] += ~done[rows]",
           "test_model.py::test_generate_stops_at_eos_and_pads_behind_it",
           "rlhf-book: EOS lost from the action mask; TRL 976"),
    Mutant("fake_eos_on_cut_samples", "model.py",
           "    columns = torch.arange(int(position.max()), device=device)\n",
           "    tokens[torch.arange(B), position - 1] = eos\n"
           "    columns = torch.arange(int(position.max()), device=device)\n",
           "test_model.py::test_generate_stops_at_eos_and_pads_behind_it",
           "OpenRLHF: the last token of a cut response becomes EOS"),
    Mutant("dropout_in_every_stage", "common.py",
           'size = dict(checkpoint["model"], dropout=0.0)',
           'size = dict(checkpoint["model"])',
           "test_common.py::test_checkpoint_round_trip", "TRL 744, 1508, 2042, PR 3234"),
    Mutant("models_left_in_training_mode", "common.py",
           "model = GPT(GPTConfig(**size)).to(device).eval()",
           "model = GPT(GPTConfig(**size)).to(device)",
           "test_common.py::test_checkpoint_round_trip", "TRL 744, PR 639"),
    Mutant("adam_betas_equal", "common.py",
           "betas=betas, eps=eps, fused=True",
           "betas=(betas[0], betas[0]), eps=eps, fused=True",
           "test_common.py::test_adamw_gets_what_it_is_given", "minChatGPT: betas (b1, b1)"),
    Mutant("adam_eps_lost", "common.py",
           "betas=betas, eps=eps, fused=True",
           "betas=betas, fused=True",
           "test_common.py::test_adamw_gets_what_it_is_given",
           "lm-human-preferences against its PyTorch ports: 1e-5 against 1e-8"),
]

# --- tokens, masks, records ----------------------------------------------------------------------

DATA = [
    Mutant("mask_by_id", "data/records.py",
           "mask[i, :len(m)] = torch.tensor(m, dtype=torch.float)",
           "mask[i, :len(m)] = torch.tensor(m, dtype=torch.float) * (tokens[i, :len(m)] != pad)",
           "test_data.py::test_masks_come_from_lengths",
           "TRL 976, 1623, transformers 22794: PAD = EOS and the model never stops"),
    Mutant("pad_is_eos", "data/tokenizer.py",
           "self.name, self.eos, self.pad = name, n, n + 1 + len(ROLES)\n"
           '        self.markers = {role: markers[f"<|{role}|>"] for role in ROLES}\n'
           "        self.n_tokens = self.pad ",
           "self.name, self.eos, self.pad = name, n, n\n"
           '        self.markers = {role: markers[f"<|{role}|>"] for role in ROLES}\n'
           "        self.n_tokens = n + 1 + len(ROLES) ",
           "test_data.py::test_special_ids", "TRL PR 3091, alignment-handbook 127"),
    Mutant("eos_missing", "data/tokenizer.py",
           "return [*self.encode(response), self.eos]",
           "return self.encode(response)",
           "test_data.py::test_template_exactly", "TRL 734, open-r1 PR 494: targets without EOS"),
    Mutant("eos_doubled", "data/tokenizer.py",
           "return [*self.encode(response), self.eos]",
           "return [*self.encode(response), self.eos, self.eos]",
           "test_data.py::test_template_exactly",
           "direct-preference-optimization asserts against it: EOS in the text and as an id"),
    Mutant("space_before_eos", "data/tokenizer.py",
           "return [*self.encode(response), self.eos]",
           'return [*self.encode(response + " "), self.eos]',
           "test_data.py::test_template_exactly", 'OpenRLHF: text + " " + eos_token'),
    Mutant("eos_missing_in_the_history", "data/tokenizer.py",
           '            if turn["role"] == "assistant":\n                ids.append(self.eos)\n',
           "",
           "test_data.py::test_template_exactly", "-"),
    Mutant("markers_read_from_text", "data/tokenizer.py",
           "return self.encoding.encode_ordinary(text)",
           'return self.encoding.encode(text, allowed_special="all")',
           "test_data.py::test_special_ids",
           "direct-preference-optimization asserts against it: EOS inside a prompt"),
    Mutant("prompt_and_answer_tokenised_together", "data/records.py",
           "            ids = head + response\n",
           "            text = tokenizer.decode(head + response)\n"
           "            ids = [*tokenizer.encode(text), tokenizer.eos]\n",
           "test_data.py::test_template_exactly", "TRL 2054, minimind PR 621, lattice 1545"),
    Mutant("prompt_is_scored", "data/records.py",
           "mask += [0] * (len(head) - len(ids))",
           "mask += [1] * (len(head) - len(ids))",
           "test_data.py::test_template_exactly", "-"),
    Mutant("eos_is_not_scored", "data/records.py",
           '[turn.get("weight", 1)] * len(response)',
           '[turn.get("weight", 1)] * (len(response) - 1) + [0]',
           "test_data.py::test_template_exactly", "TRL 976, 1623: no loss on EOS"),
    Mutant("left_padding_without_positions", "data/records.py",
           "tokens[i, :len(row)] = torch.tensor(row)\n"
           "        mask[i, :len(m)] = torch.tensor(m, dtype=torch.float)",
           "tokens[i, T - len(row):] = torch.tensor(row)\n"
           "        mask[i, T - len(m):] = torch.tensor(m, dtype=torch.float)",
           "test_data.py::test_masks_come_from_lengths",
           "summarize_from_feedback_details, TRL 6800: a 34-nat error on GPT-2"),
    Mutant("long_rows_cut", "data/records.py",
           "kept = [row for row, n in zip(rows, sizes) if n <= length]",
           "kept = [tuple(part[:length] for part in row) for row in rows]",
           "test_data.py::test_too_long_is_dropped_and_counted",
           "OpenRLHF reward_dataset.py, sft_dataset.py: cut, then taught as endings"),
    Mutant("pair_kept_if_one_side_fits", "data/records.py",
           "size=lambda row: max(map(len, row))",
           "size=lambda row: min(map(len, row))",
           "test_data.py::test_too_long_is_dropped_and_counted", "-"),
    Mutant("ranks_reversed", "data/records.py",
           "for j in range(len(ranks)) if ranks[i] < ranks[j]]",
           "for j in range(len(ranks)) if ranks[i] > ranks[j]]",
           "test_reward.py::test_pairs_of_a_ranking", "-"),
    Mutant("ties_make_pairs", "data/records.py",
           "for j in range(len(ranks)) if ranks[i] < ranks[j]]",
           "for j in range(len(ranks)) if i != j and ranks[i] <= ranks[j]]",
           "test_reward.py::test_pairs_of_a_ranking", "-"),
    Mutant("pairs_of_a_prompt_apart", "data/records.py",
           "merged.setdefault(prompt_key(record), dict(",
           "merged.setdefault(len(merged), dict(",
           "test_reward.py::test_rankings_of_one_prompt_share_an_element",
           "InstructGPT, section 3.5: pairs shuffled into one data set overfit"),
    Mutant("answers_read_once_a_pair", "data/records.py",
           'if text not in element["completions"]:',
           "if True:",
           "test_reward.py::test_rankings_of_one_prompt_share_an_element",
           "InstructGPT, section 3.5: K - 1 forward passes of each answer"),
    Mutant("split_by_row", "data/records.py",
           "keys = [split_key(r) for r in records]",
           "keys = [json.dumps(r) for r in records]",
           "test_data.py::test_split_goes_by_prompt_in_every_format", "-"),
    Mutant("split_by_the_whole_history", "data/records.py",
           "keys = [split_key(r) for r in records]",
           "keys = [prompt_key(r) for r in records]",
           "test_files.py::test_one_question_is_on_one_side_however_it_is_written",
           "HH-RLHF: dialogues that begin alike, on both sides"),
    Mutant("split_by_the_text_as_it_stands", "data/records.py",
           'return " ".join(text.casefold().split())', "return text",
           "test_files.py::test_one_question_is_on_one_side_however_it_is_written", "-"),
    Mutant("split_without_unicode_forms", "data/records.py",
           'unicodedata.normalize("NFKC", first.get("content", ""))', 'first.get("content", "")',
           "test_files.py::test_one_question_is_on_one_side_however_it_is_written", "-"),
    Mutant("a_record_decides_for_itself_alone", "data/records.py",
           "sides[is_held_out(key)].append(record)",
           'sides[record.get("held_out", is_held_out(key + " "))].append(record)',
           "test_files.py::test_the_side_is_decided_for_a_prompt_and_not_for_a_record", "-"),
    Mutant("contradictory_sides_accepted", "data/records.py",
           "if both:\n", "if False:\n",
           "test_files.py::test_the_side_is_decided_for_a_prompt_and_not_for_a_record", "-"),
    Mutant("wrong_answers_imitated", "data/records.py",
           'if "label" in record and not _label(record, where):', "if False:",
           "test_files.py::test_what_is_not_to_be_learnt_is_not_learnt", "-"),
    Mutant("turns_of_weight_0_learnt", "data/records.py",
           "learnt = {} if _counts(turn, at) else dict(weight=0)", "learnt = {}",
           "test_files.py::test_what_is_not_to_be_learnt_is_not_learnt", "-"),
    Mutant("implicit_prompt_takes_the_answer", "data/records.py",
           "while n < len(first) - 1 and all(len(o) > n + 1 and o[n]",
           "while n < len(first) and all(len(o) > n and o[n]",
           "test_files.py::test_a_shared_first_answer_is_part_of_the_prompt_but_never_the_last_turn",
           "-"),
    Mutant("system_prompt_ignored", "data/records.py",
           'if "system" not in record:\n        return prompt', 'if True:\n        return prompt',
           "test_files.py::test_a_system_prompt_beside_the_prompt_is_read", "-"),
    Mutant("input_beside_the_prompt_ignored", "data/records.py",
           'if "input" in record:', "if False:",
           "test_files.py::test_what_cannot_be_honoured_is_refused", "-"),
    Mutant("stop_markers_learnt", "data/records.py",
           "text = text.rstrip()[:-len(stop)]", "break",
           "test_files.py::test_an_answer_ends_with_our_own_eos_and_no_other", "-"),
    Mutant("bad_records_skipped_in_silence", "data/files.py",
           "if not skip_bad:", "if False:",
           "test_files.py::test_bad_records_are_all_counted_and_can_be_skipped", "-"),
    Mutant("the_name_decides_what_a_file_is", "data/files.py",
           'return first in ("{", "[")', 'return str(path).endswith(".jsonl")',
           "test_files.py::test_what_a_file_is_is_decided_by_its_bytes", "-"),
    Mutant("byte_order_mark_read_as_text", "data/files.py",
           'line.decode("utf-8-sig" if number == 1 else "utf-8")', 'line.decode("utf-8")',
           "test_files.py::test_what_a_file_is_is_decided_by_its_bytes", "-"),
    Mutant("own_prompts_cut_to_a_tenth", "evaluate.py",
           '("all" if own else "held_out")', '"held_out"',
           "test_files.py::test_own_prompts_are_all_answered", "-"),
    Mutant("held_out_answers_in_the_text", "data/text.py",
           'needed=("training",), skip_bad=skip_bad).train\n',
           'needed=("training",), skip_bad=skip_bad)\n        records = '
           'records.train + records.held_out\n',
           "test_files.py::test_pretraining_text_leaves_out_what_later_stages_hold_out", "-"),
    Mutant("stop_markers_learnt_as_text", "data/text.py",
           "found = {stop: n for stop in STOPS if", "found = {stop: n for stop in () if",
           "test_files.py::test_documents_end_at_a_stop_marker_and_it_is_not_learnt", "-"),
    Mutant("a_fraction_is_its_last_number", "data/verifier.py",
           r'and re.fullmatch(r"\s?%?( [A-Za-z ]+)?\.?\s*", text[number.end():]))', ")",
           "test_grpo.py::test_answer_records", "-"),
    Mutant("cut_answers_ranked", "label.py",
           'if s["finished"] and s["text"].strip()))',
           'if s["text"].strip()))',
           "test_stages.py::test_cut_answers_are_not_ranked",
           "OpenRLHF reward_dataset.py: a cut answer gets an EOS and is taught as an ending"),
    Mutant("blank_answers_ranked", "label.py",
           's["text"].strip()))', 's["text"]))',
           "test_naive.py::test_what_one_stage_writes_the_next_one_reads",
           "here: the tiny chain failed for two of nine label seeds"),
]

# --- SFT, the reward model, pretraining ----------------------------------------------------------

LAST = "last = batches.ends(response_mask).long()"
HIDDEN = "hidden = self.gpt(tokens)[torch.arange(len(tokens), device=tokens.device), last]"
SCORE_PLACE = "test_reward.py::test_score_is_read_at_the_last_response_token"
MICRO = "test_invariance.py::test_micro_batches_change_nothing"

REWARD = [
    Mutant("score_read_behind_eos", "reward.py", LAST, LAST + " + 1", SCORE_PLACE,
           "TRL 1893, 3750, minimind 541"),
    Mutant("score_read_before_eos", "reward.py", LAST, LAST + " - 1", SCORE_PLACE, "-"),
    Mutant("score_read_at_the_last_column", "reward.py", HIDDEN,
           "hidden = self.gpt(tokens)[:, -1]", SCORE_PLACE, "TRL 2778, llm_related 37"),
    Mutant("score_is_a_mean_over_positions", "reward.py", HIDDEN,
           "hidden = self.gpt(tokens).mean(1)", SCORE_PLACE, "minChatGPT: mean over padding too"),
    Mutant("score_place_found_by_id", "reward.py", LAST,
           "last = (tokens == self.gpt.config.n_tokens).int().argmax(1) - 1", SCORE_PLACE,
           "DeepSpeedExamples PR 672, trlx PR 433: the first PAD id, wherever it stands"),
    Mutant("pairs_reversed", "reward.py",
           "-F.logsigmoid(chosen - rejected).sum()",
           "-F.logsigmoid(rejected - chosen).sum()",
           "test_reward.py::test_bradley_terry_numbers", "-"),
    Mutant("pair_mean_divided_twice", "reward.py",
           "-F.logsigmoid(chosen - rejected).sum()",
           "-F.logsigmoid(chosen - rejected).mean()",
           "test_reward.py::test_loss_is_a_sum_and_blind_to_a_shift",
           "minChatGPT: a mean over pairs, divided by their number once more"),
    Mutant("only_the_last_piece_learns", "data/batches.py",
           "[fn(part) for part in progress(parts, bar)]",
           "[fn(part) if part is parts[-1] else fn(part).detach() for part in parts]",
           f"{MICRO}[1-reward] {MICRO}[1-dpo]", "-"),
    Mutant("pairs_across_prompts", "data/load.py",
           '        offset += len(e.rows)\n',
           '        offset += 1\n',
           "test_dpo.py::test_a_step_is_the_gradient_of_the_written_loss", "-"),
    Mutant("prompts_of_two_answers_cut_differently", "data/records.py",
           "return [head + a for a in answers], [[0] * len(head) + [1] * len(a) for a in answers]",
           "return ([(head + a)[-64:] for a in answers],\n"
           "            [([0] * len(head) + [1] * len(a))[-64:] for a in answers])",
           "test_reward.py::test_the_answers_of_a_prompt_share_its_ids", "-"),
    Mutant("reward_head_init", "reward.py",
           "        nn.init.normal_(self.head.weight, std=(config.n_embd + 1) ** -0.5)\n",
           "",
           "test_reward.py::test_head_initialisation",
           "the library's default in place of N(0, 1 / (d + 1)) of summarize-from-feedback"),
    Mutant("shift_with_the_wrong_sign", "reward.py",
           "(self.raw(tokens, response_mask) - self.shift) / self.scale",
           "(self.raw(tokens, response_mask) + self.shift) / self.scale",
           "test_reward.py::test_shift_and_scale", "-"),
    Mutant("shift_not_stored", "reward.py",
           'self.register_buffer("shift", torch.zeros(()))',
           'self.register_buffer("shift", torch.zeros(()), persistent=False)',
           "test_reward.py::test_shift_and_scale_are_stored_with_the_weights",
           "summarize_from_feedback_details keeps the bias with the weights for this"),
    Mutant("shift_not_measured", "reward.py",
           "    model.shift.fill_(float(demo_scores.mean()))\n",
           "",
           "test_reward.py::test_a_run_ends_centred_and_scaled",
           "a missing-EOS score of -1 is a penalty only where scores are centred"),
    Mutant("model_ties_count_as_right", "reward.py",
           "right = (np.sign(margins) / 2 + 0.5)",
           "right = (margins >= 0).astype(float)",
           "test_reward.py::test_equal_scores_are_half_right", "-"),
    Mutant("sft_mean_of_means", "sft.py",
           "loss = sft_loss(token_logprobs(model, tokens, mask), mask) / count",
           "loss = sft_loss(token_logprobs(model, tokens, mask), mask) / mask.sum()",
           f"{MICRO}[1-sft]", "transformers PR 35438, nanoGPT 206"),
    Mutant("pretrain_mean_of_means", "pretrain.py",
           "loss = text_loss(model, part) * len(part) / len(tokens)",
           "loss = text_loss(model, part)",
           "test_pretrain.py::test_micro_batches_change_nothing", "nanoGPT 206, TRL PR 6024"),
    Mutant("newton_schulz_keeps_the_last_step_only", "pretrain.py",
           "p if total is None else p @ total", "p",
           "test_pretrain.py::test_orthogonal_keeps_directions_and_levels_sizes", "-"),
    Mutant("muon_scale_of_the_transpose", "pretrain.py",
           "max(1, grad.size(1) / grad.size(2)) ** 0.5",
           "max(1, grad.size(2) / grad.size(1)) ** 0.5",
           "test_pretrain.py::test_muon_step_of_a_matrix", "-"),
]

# --- PPO -----------------------------------------------------------------------------------------

PLACE = "test_ppo.py::test_score_lands_on_the_last_action_and_kl_on_every_one"
SCORE = "reward[torch.arange(len(score), device=score.device), last] += score"
KL = "reward = -beta * (logp - ref_logp) * response_mask"
WHITEN = ("return (x - masked_mean(x, mask)) * torch.rsqrt(masked_variance(x, mask) + 1e-8) "
          "* mask")
MISSING = "score = torch.where(finished, score, torch.full_like(score, config.missing_eos))"
GAE = "test_ppo.py::test_gae_by_hand"
WIDE = "test_invariance.py::test_padding_changes_nothing[ppo]"
PREPARE, LOSS_KL = "test_ppo.py::test_prepare", "test_ppo.py::test_prepare_with_kl_in_the_loss"
UPDATE = "test_ppo.py::test_update_is_the_gradient_of_the_written_loss"
PTX = ("                (config.ptx_coef * ptx).backward()\n")

PPO = [
    Mutant("score_one_slot_behind_eos", "ppo.py", SCORE,
           "reward[torch.arange(len(score), device=score.device), "
           "(last + 1).clamp(max=reward.size(1) - 1)] += score", PLACE,
           "summarize_from_feedback_details, TRL 1893, 3750, PR 5338"),
    Mutant("score_one_slot_before_eos", "ppo.py", SCORE,
           "reward[torch.arange(len(score), device=score.device), last - 1] += score", PLACE, "-"),
    Mutant("score_at_the_last_column", "ppo.py", SCORE, "reward[:, -1] += score", PLACE,
           "llm_related 37"),
    Mutant("kl_sign_reversed", "ppo.py", KL, KL.replace("-beta", "beta"), PLACE,
           "rlhf-book: kl1 negated, the reward pays for drift"),
    Mutant("kl_dropped", "ppo.py", KL, "reward = 0 * (logp - ref_logp) * response_mask", PLACE,
           "nanoChatGPT: commented out; minChatGPT: the mean is discarded"),
    Mutant("kl_over_prompt_and_padding", "ppo.py", KL, "reward = -beta * (logp - ref_logp)", PLACE,
           "minChatGPT: the mask is never passed"),
    Mutant("kl_is_a_mean_over_the_sequence", "ppo.py", KL,
           KL + " / response_mask.sum(1, keepdim=True)", PLACE,
           "rlhf-book: the PPO KL is a mean over the sequence"),
    Mutant("kl_clamped_at_zero", "ppo.py", KL,
           "reward = -beta * (logp - ref_logp).clamp(min=0) * response_mask",
           "test_ppo.py::test_kl_term_keeps_its_sign", "AlpacaFarm: 0.682 for a KL of 0.557"),
    Mutant("kl_absolute", "ppo.py", KL,
           "reward = -beta * (logp - ref_logp).abs() * response_mask",
           "test_ppo.py::test_kl_term_keeps_its_sign", "TRL v1's abs: 0.808 for a KL of 0.557"),
    Mutant("whitening_over_padding", "ppo.py", WHITEN,
           "return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8) * mask",
           "test_ppo.py::test_whiten_ignores_padding", "trlx, AlpacaFarm"),
    Mutant("whitening_adds_the_mean_back", "ppo.py", WHITEN,
           "return (x * torch.rsqrt(masked_variance(x, mask) + 1e-8)) * mask",
           "test_ppo.py::test_whiten_ignores_padding",
           "torchtune/rlhf/rewards.py: shift_mean inverted, locked in by its test"),
    Mutant("whitening_skipped", "ppo.py",
           "advantage = whiten(advantage, mask)", "advantage = advantage * mask",
           PREPARE, "rlhf-book, DeepSpeed-Chat"),
    Mutant("returns_after_whitening", "ppo.py",
           "        advantage = whiten(advantage, mask)\n",
           "        advantage = whiten(advantage, mask)\n"
           "        returns = (advantage + old_value) * mask\n", PREPARE,
           "all good repositories take returns before it"),
    Mutant("gae_over_padding", "ppo.py",
           "next_advantage = (delta + gamma * lam * next_advantage) * here",
           "next_advantage = delta + gamma * lam * next_advantage", GAE,
           "minChatGPT: action mask unused"),
    Mutant("value_behind_the_last_action", "ppo.py",
           "next_value = value[:, t] * here", "next_value = value[:, t]", GAE,
           "TRL 1893: V(post-EOS) becomes a learned hop"),
    Mutant("gamma_and_lambda_swapped", "ppo.py",
           "def gae(reward, value, response_mask, gamma, lam):",
           "def gae(reward, value, response_mask, lam, gamma):", GAE, "-"),
    Mutant("lambda_missing", "ppo.py",
           "(delta + gamma * lam * next_advantage) * here",
           "(delta + gamma * next_advantage) * here", GAE,
           "PaLM-rlhf-pytorch: sequence reward minus value, no GAE"),
    Mutant("advantage_recursion_missing", "ppo.py",
           "(delta + gamma * lam * next_advantage) * here", "delta * here", GAE, "-"),
    Mutant("advantage_is_one_number_a_sequence", "ppo.py",
           "advantage[:, t] = next_advantage", "advantage[:, t:] = next_advantage[:, None]", GAE,
           "minChatGPT: one scalar a sequence"),
    Mutant("metric_mean_over_padding", "ppo.py",
           "return (x * mask).sum() / mask.sum()", "return (x * mask).mean()",
           "test_ppo.py::test_whiten_ignores_padding", "TRL 6809, 6803"),
    Mutant("policy_clip_max_for_min", "ppo.py",
           "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)",
           "test_ppo.py::test_clipped_surrogate_gradient", "-"),
    Mutant("policy_clip_always", "ppo.py",
           "torch.minimum(unclipped, clipped)", "clipped",
           "test_ppo.py::test_clipped_surrogate_gradient", "-"),
    Mutant("ratio_always_one", "ppo.py",
           "log_ratio = (logp - old_logp) * response_mask",
           "log_ratio = (logp - logp.detach()) * response_mask",
           "test_ppo.py::test_clipped_surrogate_gradient",
           "minChatGPT: the clip can never act"),
    Mutant("policy_loss_over_padding", "ppo.py",
           "loss = -(torch.minimum(unclipped, clipped) * response_mask).sum()",
           "loss = -torch.minimum(unclipped, clipped).sum()",
           "test_ppo.py::test_policy_loss_and_metrics_ignore_what_is_masked",
           "minChatGPT: action mask unused in both losses"),
    Mutant("clip_fraction_over_padding", "ppo.py",
           "clip_fraction=((clipped < unclipped) * response_mask).sum()",
           "clip_fraction=((clipped < unclipped) * response_mask).mean()",
           "test_invariance.py::test_ppo_sums_add_up_over_micro_batches", "TRL 6809"),
    Mutant("k3_reversed", "ppo.py",
           "approx_kl=((ratio - 1 - log_ratio) * response_mask).sum()",
           "approx_kl=((1 / ratio - 1 + log_ratio) * response_mask).sum()",
           "test_ppo.py::test_approx_kl_by_hand",
           "minChatGPT, rlhf-book, trlx: 0.474 for a KL of 0.557"),
    Mutant("value_clip_min_for_max", "ppo.py",
           "error = torch.maximum((value - returns)", "error = torch.minimum((value - returns)",
           "test_ppo.py::test_value_loss_is_pessimistic", "-"),
    Mutant("value_loss_without_its_half", "ppo.py",
           "return 0.5 * (error * response_mask).sum()", "return (error * response_mask).sum()",
           "test_ppo.py::test_value_loss_is_pessimistic", "-"),
    Mutant("value_loss_over_padding", "ppo.py",
           "return 0.5 * (error * response_mask).sum()", "return 0.5 * error.sum()",
           "test_invariance.py::test_ppo_arithmetic", "minChatGPT"),
    Mutant("controller_sign", "ppo.py",
           "error = min(max(kl / target - 1, -0.2), 0.2)",
           "error = min(max(1 - kl / target, -0.2), 0.2)",
           "test_ppo.py::test_adaptive_beta", "trlx: driven by a reversed KL"),
    Mutant("controller_unclipped", "ppo.py",
           "error = min(max(kl / target - 1, -0.2), 0.2)", "error = kl / target - 1",
           "test_ppo.py::test_adaptive_beta", "-"),
    Mutant("controller_per_token", "ppo.py",
           'adapt_beta(beta, row["kl"], config.kl_target,',
           'adapt_beta(beta, row["kl_per_token"], config.kl_target,',
           'test_ppo.py::test_beta_follows_the_kl_of_a_sequence',
           "OpenRLHF, verl: a target of 6 nats could not be reached"),
    Mutant("critic_not_from_the_reward_model", "ppo.py",
           "        self.load_state_dict({k: v for k, v in reward_model.state_dict().items()\n"
           '                              if k not in ("shift", "scale")})\n',
           "", "test_ppo.py::test_critic_starts_as_the_reward_model", "trlx 345, minimind"),
    Mutant("critic_without_the_scale", "ppo.py",
           "            self.head.weight.div_(reward_model.scale)\n", "",
           "test_ppo.py::test_critic_starts_as_the_reward_model", "-"),
    Mutant("critic_one_position_late", "ppo.py",
           "hidden = self.gpt(tokens[:, :-1])", "hidden = self.gpt(tokens)[:, 1:]",
           "test_ppo.py::test_critic_starts_as_the_reward_model", "-"),
    Mutant("critic_is_zero", "ppo.py",
           'critic(tokens[p], mask[p])], 1)',
           'torch.zeros_like(stats[0])], 1)',
           PREPARE, "nanoChatGPT"),
    Mutant("values_in_the_order_of_length", "data/batches.py",
           'return results[torch.cat(parts).argsort()]',
           'return results',
           PREPARE, "-"),
    Mutant("values_of_the_padding", "ppo.py",
           "value = nn.functional.pad(value, (1, 0)) * response_mask",
           "value = nn.functional.pad(value, (1, 0))",
           "test_invariance.py::test_critic_ignores_padding_and_order", "-"),
    Mutant("missing_eos_not_punished", "ppo.py", MISSING, "score = score", PREPARE,
           "TRL 3750, second point: compared with another stop token"),
    Mutant("missing_eos_with_the_wrong_sign", "ppo.py", MISSING,
           "score = torch.where(finished, score, score - config.missing_eos)", PREPARE,
           "TRL subtracts a positive penalty where others put a negative score"),
    Mutant("old_log_probabilities_stale", "ppo.py",
           'stats = token_stats(policy, tokens[p]',
           'stats = token_stats(reference, tokens[p]',
           PREPARE, "trlx 508, NeMo-Aligner 68: the ratio does not start at 1"),
    Mutant("kl_to_the_behaviour_policy", "ppo.py",
           "reward = token_rewards(score, old_logp, ref_logp, mask, beta)",
           "reward = token_rewards(score, old_logp, old_logp, mask, beta)", PREPARE,
           "PaLM-rlhf-pytorch: no reference anywhere"),
    Mutant("no_temperature_in_old_log_probabilities", "ppo.py",
           "token_stats(policy, tokens[p], mask[p], config.temperature, entropy=True,",
           "token_stats(policy, tokens[p], mask[p], 1.0, entropy=True,", PREPARE,
           "TRL PR 3029, OpenRLHF PR 857"),
    Mutant("no_temperature_in_the_reference", "model.py",
           "ref_logp = ref_all.gather(1, targets[:, None])[:, 0]",
           "ref_logp = F.log_softmax(ref_model.logits(ref_hidden), -1)"
           ".gather(1, targets[:, None])[:, 0]",
           "test_model.py::test_exact_kl_at_a_temperature", "OpenRLHF 1319, TRL 3169"),
    Mutant("no_temperature_in_the_update", "ppo.py",
           "policy, tokens[p], mask[p], config.temperature,\n                        entropy=",
           "policy, tokens[p], mask[p], 1.0,\n                        entropy=", UPDATE,
           "TRL 2358, NeMo-RL PR 316"),
    Mutant("no_temperature_in_rollouts", "ppo.py",
           'config.max_new_tokens, tokenizer.eos,\n            config.temperature,',
           'config.max_new_tokens, tokenizer.eos,\n            1.0,',
           "test_ppo.py::test_settings_reach_every_function", "TRL 3169"),
    Mutant("greedy_kl_in_the_loss", "ppo.py",
           "        reward = reward - beta * next_state_kl(exact_kl, mask)\n", "", LOSS_KL,
           "minimind, GRPO: the drift of later states costs an action nothing"),
    Mutant("kl_of_this_state_in_the_reward", "ppo.py",
           "nn.functional.pad(exact_kl[:, 1:], (0, 1)) * response_mask",
           "exact_kl * response_mask", LOSS_KL, "-"),
    Mutant("beta_not_in_units_of_the_advantage", "ppo.py",
           'loss = loss + beta / batch["scale"] * (kl * mask[p]).sum()',
           "loss = loss + beta * (kl * mask[p]).sum()", UPDATE, "-"),
    Mutant("k1_in_the_loss", "ppo.py",
           "(kl * mask[p]).sum()", '((logp - batch["ref_logp"][p]) * mask[p]).sum()', UPDATE,
           "TRL 3025, PR 4638, open-instruct PR 535: a gradient of zero on average"),
    Mutant("k3_in_the_loss", "ppo.py",
           "(kl * mask[p]).sum()",
           '(((batch["ref_logp"][p] - logp).exp() - 1 + logp - batch["ref_logp"][p])'
           " * mask[p]).sum()", UPDATE,
           "minimind, TRL 3025: the gradient of KL(ref || pi), not of KL(pi || ref)"),
    Mutant("entropy_bonus_with_the_wrong_sign", "ppo.py",
           "loss = loss - config.entropy_coef *", "loss = loss + config.entropy_coef *", UPDATE,
           "-"),
    Mutant("ppo_mean_of_means", "ppo.py",
           "(loss / count).backward()", "(loss / mask[p].sum()).backward()",
           f"{MICRO}[1-ppo]", "TRL 2604, 5619, PR 6024; nanochat: per forward pass"),
    Mutant("critic_mean_of_means", "ppo.py",
           "(v_loss / count).backward()", "(v_loss / mask[p].sum()).backward()",
           f"{MICRO}[1-ppo]", "TRL 2604, 5619, PR 6024; nanochat: per forward pass"),
    Mutant("loss_divided_by_padding_too", "ppo.py",
           "count = mask[rows].sum()", "count = mask[rows].numel()", UPDATE, "TRL 6809"),
    Mutant("ptx_with_the_wrong_sign", "ppo.py", PTX, PTX.replace("(config", "(-config"), UPDATE,
           "-"),
    Mutant("ptx_dropped", "ppo.py", PTX, "                pass\n", UPDATE,
           "logged, but never added: no living repository has the term"),
    Mutant("clipped_after_the_step", "ppo.py",
           "            norms.append([torch.nn.utils.clip_grad_norm_(m.parameters(), "
           "config.grad_clip)\n"
           "                          for m in (policy, critic)])\n"
           "            for optimizer in optimizers:\n"
           "                optimizer.step()\n",
           "            for optimizer in optimizers:\n"
           "                optimizer.step()\n"
           "            norms.append([torch.nn.utils.clip_grad_norm_(m.parameters(), "
           "config.grad_clip)\n"
           "                          for m in (policy, critic)])\n"
           "            for optimizer in optimizers:\n",
           "test_ppo.py::test_gradients_are_clipped_before_the_step",
           "minChatGPT: clip before backward"),
    Mutant("metrics_divided_by_padding_too", "ppo.py",
           "v.item() / (n_tokens * config.epochs)", "v.item() / (mask.numel() * config.epochs)",
           WIDE, "TRL 6809: clip fraction and approximate KL diluted"),
    Mutant("entropy_over_padding", "evaluate.py",
           'entropy=batch["entropy"].sum().item() / n_tokens',
           'entropy=batch["entropy"].mean().item()',
           WIDE, "TRL 2022, 6803, open-instruct 756"),
    Mutant("kl_per_token_over_padding", "evaluate.py",
           'kl_per_token=seq_kl.sum().item() / n_tokens',
           'kl_per_token=seq_kl.sum().item() / mask.numel()',
           WIDE, "TRL 6809"),
    Mutant("reference_is_the_policy", "evaluate.py",
           '    reference = common.load_policy(config.init, common.POLICIES, '
           'device)[0].requires_grad_(False)\n',
           '    reference = policy\n',
           'test_ppo.py::test_settings_reach_every_function',
           "nanoChatGPT: the reference shares the trained module"),
    Mutant("adam_eps_not_handed_on", "ppo.py",
           "optimizer = common.adamw([policy], config.lr, eps=config.adam_eps)",
           "optimizer = common.adamw([policy], config.lr)",
           "test_ppo.py::test_settings_reach_every_function",
           "lm-human-preferences against its PyTorch ports"),
    Mutant("resume_forgets_the_critic_optimiser", "ppo.py",
           'kept = dict(policy=policy, critic=critic, optimizer=optimizer,\n               '
           ' critic_optimizer=critic_optimizer)',
           'kept = dict(policy=policy, critic=critic, optimizer=optimizer)',
           "test_ppo.py::test_resume_is_exact", "-"),
    Mutant("resume_forgets_beta", "ppo.py",
           'state.get("beta", config.beta)',
           'config.beta',
           "test_ppo.py::test_resume_is_exact", "-"),
    Mutant("ties_are_right", "studies/knowledge.py",
           "right = np.sign(better - worse) / 2 + 0.5", "right = (better >= worse) * 1.0",
           "test_knowledge.py::test_shares", "-"),
    Mutant("pairs_read_across", "studies/knowledge.py", ".reshape(-1, 2).T", ".reshape(2, -1)",
           "test_knowledge.py::test_answers_stand_in_the_order_of_their_pair", "-"),
    Mutant("resume_from_a_retrained_parent", "common.py",
           'if before.get("parents") != self.parents:',
           'if set(before["parents"]) != set(self.parents):',
           "test_common.py::test_resume_needs_the_same_inputs", "-"),
    Mutant("records_counted_as_prompts", "data/load.py",
           "records = distinct(dict(", "records = (lambda rows: rows)(dict(",
           "test_evaluate.py::test_a_prompt_is_asked_once", "-"),
    Mutant("kl_error_of_independent_prompts", "evaluate.py",
           'f"{name}_se": common.clustered_se(x, cluster)}',
           'f"{name}_se": common.clustered_se(x, range(len(x)))}',
           "test_evaluate.py::test_the_error_of_the_kl_is_clustered", "-"),
    Mutant("kl_error_of_independent_answers", "evaluate.py",
           '[question(p, synthetic) for p in prompts])\n        row',
           'range(len(seq_kl)))\n        row',
           "test_naive.py::test_script_and_twin_agree[grpo-0]", "-"),
    Mutant("context_of_the_reward_model_ignored", "evaluate.py",
           "block_size = min(block_size, reward_model.gpt.config.block_size)",
           "block_size = min(block_size, policy.config.block_size)",
           "test_evaluate.py::test_a_reward_model_with_a_smaller_context", "-"),
    Mutant("frontier_of_an_older_sft_model", "studies/frontier.py",
           'if first.get("parents", {}).get(role) != hashes[role]:', "if False:",
           "test_evaluate.py::test_frontier_runs_and_plots", "-"),
    Mutant("frontier_of_other_settings", "studies/frontier.py",
           "for field, value in wanted.items():\n        made =",
           'for field, value in (("beta", beta), ("seed", seed)):\n        made =',
           "test_evaluate.py::test_frontier_runs_and_plots", "-"),
    Mutant("ties_count_as_wins", "evaluate.py",
           'np.sign(after - before) * differ / 2 + 0.5)',
           '(after >= before).astype(float))',
           "test_ppo.py::test_comparison_with_the_reference", "-"),
    Mutant("an_answer_wins_over_itself_by_a_rounding", "evaluate.py",
           'np.sign(after - before) * differ / 2 + 0.5)',
           'np.sign(after - before) / 2 + 0.5)',
           "test_ppo.py::test_comparison_with_the_reference", "-"),
    Mutant("missing_eos_not_punished_in_the_comparison", "evaluate.py",
           '[s["finished"] for s in samples],  # a cut', '[True for s in samples],  # a cut',
           "test_ppo.py::test_comparison_with_the_reference", "-"),
    Mutant("best_of_n_across_prompts", "evaluate.py",
           'scores.reshape(-1, n).argmax(1)',
           'scores.reshape(n, -1).argmax(0)',
           "test_ppo.py::test_comparison_with_the_reference", "-"),
]

# --- DPO and its relatives -----------------------------------------------------------------------

BY_HAND, STEP = "test_dpo.py::test_losses_by_hand", (
    "test_dpo.py::test_a_step_is_the_gradient_of_the_written_loss")
CACHE = ("test_dpo.py::test_another_reference_has_another_cache "
         "test_dpo.py::test_other_data_has_another_cache")
KEY = ("key = common.text_hash(json.dumps([common.weights_hash(reference.state_dict()), rows, "
       "masks,\n                                       tokenizer.name, device.type]))")
DOUBT = "test_dpo.py::test_a_cache_that_is_not_what_its_name_says_is_refused"

DPO = [
    Mutant("dpo_pairs_reversed", "dpo.py",
           "return -F.logsigmoid(beta * (chosen - rejected))\n",
           "return -F.logsigmoid(beta * (rejected - chosen))\n",
           "test_dpo.py::test_dpo_gradient", "-"),
    Mutant("dpo_winners_and_losers_swapped_in_the_batch", "data/load.py",
           "        winners += [offset + i for i, _ in e.pairs]\n"
           "        losers += [offset + j for _, j in e.pairs]\n",
           "        losers += [offset + i for i, _ in e.pairs]\n"
           "        winners += [offset + j for _, j in e.pairs]\n",
           f"{STEP} test_dpo.py::test_answers_of_a_prompt_share_its_ids_and_end_with_eos", "-"),
    Mutant("dpo_without_a_reference", "dpo.py",
           "reward = beta * (seq_logp - ref_seq_logp)", "reward = beta * seq_logp", BY_HAND,
           "-"),
    Mutant("dpo_mean_for_the_sum", "dpo.py",
           'return reward / length if loss in ("ipo_mean", "dpo_norm") else reward',
           'return reward / length if loss != "simpo" else reward', BY_HAND,
           "LLMs-from-scratch: a mean per token where the paper has the sum; TRL 789"),
    Mutant("dpo_norm_of_sums", "dpo.py",
           'return reward / length if loss in ("ipo_mean", "dpo_norm") else reward',
           'return reward / length if loss == "ipo_mean" else reward', BY_HAND,
           "-"),
    Mutant("ipo_mean_of_sums", "dpo.py",
           'return reward / length if loss in ("ipo_mean", "dpo_norm") else reward',
           'return reward / length if loss == "dpo_norm" else reward',
           "test_dpo.py::test_ipo_of_sums_and_of_means_have_their_minimum_at_other_places",
           "TRL PR 1265, issue 1677: a sum where the authors asked for a mean"),
    Mutant("ipo_per_token_where_the_sum_is_asked", "dpo.py",
           'return reward / length if loss in ("ipo_mean", "dpo_norm") else reward',
           'return reward / length if loss in ("ipo", "ipo_mean", "dpo_norm") else reward',
           "test_dpo.py::test_ipo_of_sums_and_of_means_have_their_minimum_at_other_places",
           "TRL 1677: a mean under the paper's name"),
    Mutant("ipo_margin_twice_as_far", "dpo.py",
           "return (chosen - rejected - 1 / (2 * beta)) ** 2",
           "return (chosen - rejected - 1 / beta) ** 2",
           "test_dpo.py::test_ipo_is_least_at_its_margin", "-"),
    Mutant("simpo_with_sums", "dpo.py",
           "return beta * seq_logp / length", "return beta * seq_logp", BY_HAND,
           "-"),
    Mutant("simpo_margin_not_times_beta", "dpo.py",
           "return -F.logsigmoid(beta * (chosen - rejected - margin))",
           "return -F.logsigmoid(beta * (chosen - rejected) - margin)", BY_HAND,
           "gamma for gamma / beta: TRL's simpo_gamma is the product, SimPO's README the ratio"),
    Mutant("label_smoothing_on_the_wrong_side", "dpo.py",
           "return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)",
           "return -smoothing * F.logsigmoid(margin) - (1 - smoothing) * F.logsigmoid(-margin)",
           "test_dpo.py::test_cdpo_is_least_where_its_preference_is_the_labels_reliability", "-"),
    Mutant("smoothing_debiased", "dpo.py",
           "return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)",
           "return (-(1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)"
           ") / (1 - 2 * smoothing)",
           "test_dpo.py::test_cdpo_is_least_where_its_preference_is_the_labels_reliability",
           "TRL's `robust` is this debiased form, which may go negative"),
    Mutant("kto_labels_flipped", "data/load.py",
           'labels=[1 if r["label"] else -1]',
           'labels=[-1 if r["label"] else 1]',
           "test_dpo.py::test_labels_are_those_of_the_file", "-"),
    Mutant("kto_labels_of_a_ranking_flipped", "data/load.py",
           "wins = [sum((n == i) - (n == j) for i, j in pairs)",
           "wins = [sum((n == j) - (n == i) for i, j in pairs)",
           "test_dpo.py::test_labels_and_best_of_a_ranking", "-"),
    Mutant("kto_weights_swapped", "dpo.py",
           "torch.where(label > 0, config.desirable, config.undesirable)",
           "torch.where(label < 0, config.desirable, config.undesirable)",
           "test_dpo.py::test_kto_by_hand", "-"),
    Mutant("kto_answers_without_a_label_cost", "dpo.py",
           "config.undesirable) * label.abs()", "config.undesirable)",
           "test_dpo.py::test_kto_by_hand", "-"),
    Mutant("kto_baseline_with_the_wrong_sign", "dpo.py",
           "(1 - torch.sigmoid(label * config.beta * (log_ratio - baseline)))",
           "(1 - torch.sigmoid(label * config.beta * (log_ratio + baseline)))",
           "test_dpo.py::test_kto_by_hand", "-"),
    Mutant("z0_below_zero", "dpo.py", ".detach().mean().clamp(min=0)", ".detach().mean()",
           "test_dpo.py::test_kl_baseline", "-"),
    Mutant("z0_with_a_gradient", "dpo.py", ".detach().mean().clamp(min=0)",
           ".mean().clamp(min=0)", "test_dpo.py::test_kl_baseline",
           "-"),
    Mutant("z0_from_matched_answers", "dpo.py",
           "train[order[(n + 1) % len(train)]]", "train[order[n]]",
           "test_dpo.py::test_z0_comes_from_the_answers_to_the_next_prompts", "-"),
    Mutant("z0_from_a_reversal", "dpo.py",
           "train[order[(n + 1) % len(train)]]", "train[order[len(train) - 1 - n]]",
           "test_dpo.py::test_z0_comes_from_the_answers_to_the_next_prompts",
           "TRL 1911, PR 1380, 1402, 2153"),
    Mutant("z0_of_a_single_prompt", "dpo.py",
           'if config.loss == "kto" and len(train) < 2:', "if False:",
           "test_dpo.py::test_bad_input_is_one_clear_line", "TRL 2554"),
    Mutant("z0_of_chosen_answers_only", "dpo.py",
           "i = first.masks[0].index(1), n % len(second.rows)", "i = first.masks[0].index(1), 0",
           "test_dpo.py::test_mismatch_is_one_prompt_with_the_answer_to_another", "-"),
    Mutant("z0_of_the_other_prompt", "dpo.py",
           "return first.rows[0][:head] + answer, [0] * head + [1] * len(answer)",
           "return second.rows[0], second.masks[0]",
           "test_dpo.py::test_mismatch_is_one_prompt_with_the_answer_to_another", "-"),
    Mutant("z0_over_the_context", "dpo.py",
           "others = [o for o in others if len(o[0]) <= policy.config.block_size]\n", "pass\n",
           "test_dpo.py::test_z0_leaves_out_what_does_not_fit",
           "-"),
    Mutant("kto_mean_of_means", "dpo.py",
           "baseline, config).sum() / count", "baseline, config).mean()", STEP,
           "transformers PR 35438, TRL 5619"),
    Mutant("nll_with_the_wrong_sign", "dpo.py",
           'total = loss - config.nll * seq_logp[best]',
           'total = loss + config.nll * seq_logp[best]',
           STEP, "-"),
    Mutant("nll_of_every_answer", "dpo.py",
           "config.nll * seq_logp[best].sum()", "config.nll * seq_logp.sum()", STEP, "-"),
    Mutant("best_answers_that_lost", "data/load.py",
           'if n not in lost and labels[n] > 0], record)',
           'if labels[n] > 0], record)',
           "test_dpo.py::test_labels_and_best_of_a_ranking", "-"),
    Mutant("dpo_sums_without_eos", "data/records.py",
           "[[0] * len(head) + [1] * len(a) for a in answers]",
           "[[0] * len(head) + [1] * (len(a) - 1) + [0] for a in answers]",
           'test_dpo.py::test_answers_of_a_prompt_share_its_ids_and_end_with_eos',
           "TRL 976, 1623: PAD = EOS takes the stop out of the loss"),
    Mutant("sequence_mean_for_the_sum", "evaluate.py",
           'token_logprobs(model, tokens, mask, temperature).sum(1),',
           'token_logprobs(model, tokens, mask, temperature).sum(1) / mask.sum(1),',
           'test_dpo.py::test_sequence_logprobs_are_sums_with_eos_in_the_order_given',
           "LLMs-from-scratch, TRL 789"),
    Mutant("length_without_eos", "dpo.py",
           'return tokens, mask, flat("ref"), mask.sum(1),',
           'return tokens, mask, flat("ref"), mask.sum(1) - 1,',
           f"{STEP} test_dpo.py::test_answers_of_a_prompt_share_its_ids_and_end_with_eos",
           "-"),
    Mutant("length_with_the_prompt", "dpo.py",
           'flat("ref"), mask.sum(1), flat("labels")',
           'flat("ref"), (tokens != pad).sum(1), flat("labels")',
           f"{STEP} test_dpo.py::test_answers_of_a_prompt_share_its_ids_and_end_with_eos", "-"),
    Mutant("cache_without_the_weights", "dpo.py", KEY,
           KEY.replace("common.weights_hash(reference.state_dict()), ", ""), CACHE,
           "TRL 2423: the cached path diverges from the direct one"),
    Mutant("cache_without_the_data", "dpo.py", KEY,
           KEY.replace(" rows, masks,", " len(rows),"), CACHE,
           "-"),
    Mutant("cache_without_the_order", "dpo.py", KEY,
           KEY.replace(" rows, masks,", " sorted(rows), sorted(masks),"), CACHE, "-"),
    Mutant("cache_without_the_masks", "dpo.py", KEY, KEY.replace(" rows, masks,", " rows,"), CACHE,
           "-"),
    Mutant("cache_without_the_tokenizer", "dpo.py", KEY,
           KEY.replace("tokenizer.name, device.type", "device.type"),
           "test_dpo.py::test_another_tokenizer_has_another_cache", "-"),
    Mutant("stale_cache_accepted", "dpo.py",
           'cached.get("key") != key', 'False', DOUBT,
           "cf. TRL 2423: precomputed reference log-probabilities that diverge"),
    Mutant("short_cache_accepted", "dpo.py",
           '\\\n                or len(cached.get("logps", ())) != len(rows):', ":", DOUBT, "-"),
    Mutant("cache_never_used", "dpo.py", "    if path.exists():\n        cached",
           "    if False:\n        cached",
           "test_dpo.py::test_the_cache_is_used_again_when_nothing_changed", "-"),
    Mutant("trace_writes_a_cache", "trace.py",
           'dpo.set_reference(batch, sequence_logprobs(reference, *all_rows(batch), '
           'tokenizer.pad))',
           "dpo.reference_logprobs(reference, batch, tokenizer, config, device)",
           "test_trace.py::test_dpo", "-"),
    Mutant("dpo_reference_is_the_policy", "evaluate.py",
           '    reference = common.load_policy(config.init, common.POLICIES, '
           'device)[0].requires_grad_(False)\n',
           '    reference = policy\n',
           'test_dpo.py::test_the_reference_stays_where_it_was',
           "nanoChatGPT: the reference shares the trained module"),
    Mutant("implicit_ties_count_as_right", "dpo.py",
           "return torch.sign(margin * (margin.abs() > 1e-5)) / 2 + 0.5",
           "return (margin >= 0).double()", "test_dpo.py::test_ordered_counts_ties_half",
           "-"),
    Mutant("ties_by_rounding", "dpo.py",
           "torch.sign(margin * (margin.abs() > 1e-5))", "torch.sign(margin)",
           "test_dpo.py::test_ordered_counts_ties_half", "-"),
    Mutant("held_out_pairs_are_trained_on", "dpo.py",
           "    # as many training prompts as held-out ones",
           "    train = train + held_out\n    # as many training prompts as held-out ones",
           "test_dpo.py::test_no_held_out_pair_is_trained_on", "-"),
    Mutant("training_accuracy_called_held_out", "dpo.py",
           "metrics = pair_metrics(policy, held_out, config, tokenizer.pad)",
           "metrics = pair_metrics(policy, watched, config, tokenizer.pad)",
           "test_dpo.py::test_held_out_and_training_pairs_are_told_apart", "-"),
    Mutant("chosen_and_rejected_log_probabilities_swapped", "dpo.py",
           "chosen_logp=seq_logp[winners].mean().item(),\n"
           "                rejected_logp=seq_logp[losers]",
           "chosen_logp=seq_logp[losers].mean().item(),\n"
           "                rejected_logp=seq_logp[winners]",
           "test_dpo.py::test_both_log_probabilities_are_reported", "-"),
    Mutant("metrics_without_beta", "dpo.py",
           "reward = implicit_reward(seq_logp, ref, length, config.loss, config.beta)\n"
           '    if config.loss == "kto":\n        loss = kto_loss(seq_logp - ref, label, 0.0',
           "reward = implicit_reward(seq_logp, ref, length, config.loss, 1.0)\n"
           '    if config.loss == "kto":\n        loss = kto_loss(seq_logp - ref, label, 0.0',
           "test_dpo.py::test_both_log_probabilities_are_reported",
           "LLMs-from-scratch: logged rewards omit beta"),
    Mutant("over_long_answers_cut", "data/load.py",
           '        records = fits(f"{name} rankings", records, block_size,\n'
           '                       lambda r: max(map(len, encode_ranking(tokenizer, r)[0])))\n',
           "        cut = lambda t: tokenizer.decode(tokenizer.encode(t)[:block_size // 2])\n"
           "        records = [r | dict(completions=[cut(t) for t in r['completions']])\n"
           "                   for r in records]\n",
           "test_dpo.py::test_an_over_long_answer_drops_its_ranking",
           "OpenRLHF reward_dataset.py: cut, then taught as endings"),
    Mutant("dpo_resume_forgets_the_optimiser", "dpo.py",
           'state = run.load_state(policy=policy, optimizer=optimizer)',
           'state = run.load_state(policy=policy)',
           "test_dpo.py::test_resume_is_exact", "-"),
    Mutant("dpo_order_of_one_epoch_for_all", "dpo.py",
           'common.stream(config.seed, "dpo", "order", epoch)',
           'common.stream(config.seed, "dpo", "order")',
           "test_naive.py::test_script_and_twin_agree[dpo-1]", "-"),
    Mutant("labels_read_by_truth", "data/records.py",
           'if record["label"] not in (0, 1):', "if False:",
           "test_dpo.py::test_label_records_that_are_none", "-"),
]

# --- GRPO ----------------------------------------------------------------------------------------

G = "test_grpo.py::"
BY_HAND, WRITTEN = G + "test_advantages_by_hand", (
    G + "test_update_is_the_gradient_of_the_written_loss")
NUMBER, LOGGED = G + "test_the_number_that_a_text_ends_on", G + "test_logged_numbers"

GRPO = [
    Mutant("std_of_constant_groups", "grpo.py",
           "return (centred * has_signal(reward, K)[:, None]).flatten()",
           "return centred.flatten()",
           G + "test_groups_without_signal_have_no_advantage",
           "-"),
    Mutant("std_without_eps_and_signal", "grpo.py",
           "        centred = centred / (group.std(1, keepdim=True) + 1e-4)\n",
           "        centred = centred / group.std(1, keepdim=True)\n",
           G + "test_groups_without_signal_have_no_advantage", "-"),
    Mutant("leave_one_out_without_its_factor", "grpo.py",
           "centred = centred * (K / (K - 1))", "centred = centred * 1.0",
           f"{BY_HAND} {G}test_rloo_leaves_the_response_itself_out",
           "nanochat: group mean only, a documented choice"),
    Mutant("baseline_over_the_whole_batch", "grpo.py",
           "centred = group - group.mean(1, keepdim=True)", "centred = group - group.mean()",
           BY_HAND, "REINFORCE++ does it on purpose"),
    Mutant("groups_read_across", "grpo.py",
           "    group = reward.view(-1, K)\n    centred",
           "    group = reward.view(K, -1).T\n    centred",
           BY_HAND, "-"),
    Mutant("prompts_tiled", "grpo.py",
           'return [train[i] for i in chosen for _ in range(config.k)], texts',
           'return [train[i] for _ in range(config.k) for i in chosen], texts',
           G + "test_answers_are_checked_against_their_own_prompt", "-"),
    Mutant("std_is_biased", "grpo.py",
           "group.std(1, keepdim=True)", "group.std(1, correction=0, keepdim=True)", BY_HAND, "-"),
    Mutant("clip_high_ignored", "grpo.py",
           "ratio.clamp(1 - clip, 1 + clip_high)", "ratio.clamp(1 - clip, 1 + clip)",
           G + "test_asymmetric_clip", "-"),
    Mutant("clip_high_on_both_sides", "grpo.py",
           "ratio.clamp(1 - clip, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_high)",
           G + "test_asymmetric_clip", "-"),
    Mutant("grpo_clip_max_for_min", "grpo.py",
           "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)",
           G + "test_asymmetric_clip", "-"),
    Mutant("k2_per_token", "grpo.py",
           "return 0.5 * log_ratio.sum(1) ** 2", "return 0.5 * (log_ratio ** 2).sum(1)",
           f"{G}test_kl_losses_by_hand "
           f"{G}test_rloo_gradient_is_the_gradient_of_the_objective[loss]", "-"),
    Mutant("grpo_k3_reversed", "grpo.py",
           "return ((-log_ratio).exp() - 1 + log_ratio).sum(1)",
           "return (log_ratio.exp() - 1 - log_ratio).sum(1)",
           f"{G}test_kl_losses_by_hand {G}test_k3_has_the_mean_of_the_kl",
           "minChatGPT, rlhf-book, trlx"),
    Mutant("k1_as_a_loss", "grpo.py",
           "return 0.5 * log_ratio.sum(1) ** 2", "return log_ratio.sum(1)",
           f"{G}test_kl_losses_by_hand", "TRL 3025, open-instruct PR 535: no gradient on average"),
    Mutant("k1_pays_for_drift", "grpo.py",
           "reward = score - config.beta *", "reward = score + config.beta *",
           G + "test_prepare_with_kl_in_the_reward", "rlhf-book: kl1 negated"),
    Mutant("k1_behind_the_baseline", "grpo.py",
           "advantage=group_advantage(reward, config.k, config.advantage), old_logp",
           "advantage=group_advantage(score, config.k, config.advantage) + reward - score,\n"
           "                old_logp", G + "test_prepare_with_kl_in_the_reward", "-"),
    Mutant("mean_of_means", "grpo.py",
           "(weight * (loss + kl)).sum().backward()",
           "((loss + kl) / mask[p].sum()).sum().backward()",
           G + "test_order_padding_and_micro_batches_change_nothing",
           "TRL 5619, PR 6024: 0.5x and 4x gradients"),
    Mutant("weights_of_the_micro_batch", "grpo.py",
           "per = dict(sequence=n * lengths,", "per = dict(sequence=n * lengths.mean(),",
           G + "test_aggregations_by_hand", "-"),
    Mutant("dropped_groups_in_the_denominator", "grpo.py",
           "    n = kept.sum()\n", "    n = len(kept)\n",
           G + "test_aggregations_by_hand", "-"),
    Mutant("dropped_tokens_in_the_denominator", "grpo.py",
           "tokens=(kept * lengths).sum()", "tokens=lengths.sum()",
           G + "test_aggregations_by_hand", "-"),
    Mutant("groups_kept_for_their_kl", "grpo.py",
           "kept = has_signal(score, config.k)", "kept = has_signal(reward, config.k)",
           G + "test_prepare_with_kl_in_the_loss_or_without", "-"),
    Mutant("truncated_answers_are_right", "grpo.py",
           "missing = config.missing_eos if config.reward == \"model\" else 0.0",
           "missing = config.missing_eos if config.reward == \"model\" else 1.0",
           G + "test_a_cut_response_is_wrong_for_a_verifier", "-"),
    Mutant("truncated_answers_are_judged", "grpo.py",
           "reward = score = torch.where(finished, score, torch.full_like(score, missing))",
           "reward = score",
           f"{G}test_a_cut_response_is_wrong_for_a_verifier {G}test_prepare_with_kl_in_the_reward",
           "TRL's GRPOTrainer, unless mask_truncated_completions is set"),
    Mutant("cut_answers_count_in_the_accuracy", "grpo.py",
           "return [float(f and is_right(t, a))", "return [float(is_right(t, a))",
           G + "test_right_and_wrong", "-"),
    Mutant("grpo_old_log_probabilities_stale", "grpo.py",
           'logp, entropy, _, _ = token_stats(policy, tokens[p]',
           'logp, entropy, _, _ = token_stats(reference, tokens[p]',
           G + "test_prepare_with_kl_in_the_reward", "trlx 508, NeMo-Aligner 68"),
    Mutant("eos_missing_in_the_sums", "grpo.py",
           "    log_ratio = (logp - ref_logp) * response_mask\n",
           "    response_mask = response_mask * torch.nn.functional.pad(response_mask[:, 1:], "
           "(0, 1))\n    log_ratio = (logp - ref_logp) * response_mask\n",
           G + "test_kl_losses_by_hand", "rlhf-book: EOS lost from the action mask"),
    Mutant("no_temperature_in_the_group_update", "grpo.py",
           "logp = token_logprobs(policy, tokens[p], mask[p], config.temperature)",
           "logp = token_logprobs(policy, tokens[p], mask[p])",
           G + "test_settings_reach_every_function", "TRL 2358, NeMo-RL PR 316"),
    Mutant("reference_asked_for_nothing", "grpo.py",
           '] if config.beta > 0 else []',
           '] if reference is not None else []',
           G + "test_without_kl_no_reference_is_asked", "-"),
    Mutant("answers_compared_as_text", "data/verifier.py",
           "return final_answer(response) == expected",
           "return str(final_answer(response)) == str(expected)",
           G + "test_right_and_wrong", "-"),
    Mutant("first_number_taken", "data/verifier.py",
           'value = Decimal(found[-1][1].replace(",", ""))',
           'value = Decimal(found[0][1].replace(",", ""))', NUMBER,
           "-"),
    Mutant("minus_of_a_difference", "data/verifier.py",
           r"(?:(?<![\w)%.])[-−]", r"(?:[-−]", NUMBER, "-"),
    Mutant("calculator_marks_left_in", "data/verifier.py",
           "text = strip_calculator(text)", "text = text", NUMBER, "-"),
    Mutant("kl_of_the_loss_with_the_wrong_sign", "grpo.py",
           "(weight * (loss + kl)).sum().backward()", "(weight * (loss - kl)).sum().backward()",
           WRITTEN + "[kept0-options4]", "rlhf-book: kl1 negated"),
    Mutant("beta_lost_in_the_loss", "grpo.py",
           "kl = config.beta * kl_loss(", "kl = kl_loss(", WRITTEN + "[kept0-options4]", "-"),
    Mutant("kl_divided_by_the_std", "grpo.py",
           'kl_in="loss", kl_estimator="k3"),', 'kl_in="reward", kl_estimator="k3"),',
           G + "test_prepare_with_kl_in_the_loss_or_without", "-"),
    Mutant("rloo_is_a_mean_per_answer", "grpo.py",
           '"rloo": dict(advantage="rloo", aggregate="sum"',
           '"rloo": dict(advantage="rloo", aggregate="sequence"',
           G + "test_methods_are_those_of_the_papers", "-"),
    Mutant("clip_moves_one_side_only", "grpo.py",
           'chosen = dict(clip_high=config.clip, ',
           'chosen = dict(clip_high=0.2, ',
           G + "test_the_clip_is_symmetric_but_for_dapo", "-"),
    Mutant("constant_length_is_the_width_of_the_batch", "grpo.py",
           "config.aggregate,\n                                        config.max_new_tokens)",
           "config.aggregate,\n                                        mask.size(1))",
           WRITTEN + "[kept0-options1]", "-"),
    Mutant("grpo_ratio_always_one", "grpo.py",
           "log_ratio = (logp - old_logp) * response_mask",
           "log_ratio = (logp - logp.detach()) * response_mask",
           G + "test_asymmetric_clip", "minChatGPT: the clip can never act"),
    Mutant("grpo_loss_over_padding", "grpo.py",
           "loss = -(torch.minimum(unclipped, clipped) * response_mask).sum(1)",
           "loss = -torch.minimum(unclipped, clipped).sum(1)",
           G + "test_policy_loss_is_a_sum_over_each_response",
           "minChatGPT: action mask unused in both losses"),
    Mutant("grpo_reference_is_the_policy", "evaluate.py",
           '    reference = common.load_policy(config.init, common.POLICIES, '
           'device)[0].requires_grad_(False)\n',
           '    reference = policy\n',
           G + "test_settings_reach_every_function",
           "nanoChatGPT: the reference shares the trained module"),
    Mutant("no_temperature_in_group_rollouts", "grpo.py",
           "config.temperature, common.stream(", "1.0, common.stream(",
           G + "test_settings_reach_every_function", "TRL 3169"),
    Mutant("no_temperature_in_old_group_log_probabilities", "grpo.py",
           'token_stats(policy, tokens[p], mask[p], config.temperature,\n                  '
           '                        entropy=True)',
           'token_stats(policy, tokens[p], mask[p], 1.0,\n                                 '
           '         entropy=True)',
           G + "test_prepare_with_kl_in_the_reward", "TRL PR 3029, OpenRLHF PR 857"),
    Mutant("no_temperature_in_the_group_reference", "grpo.py",
           '[token_logprobs(reference, tokens[p], mask[p], config.temperature)',
           '[token_logprobs(reference, tokens[p], mask[p])',
           G + "test_prepare_with_kl_in_the_reward", "OpenRLHF 1319, TRL 3169"),
    Mutant("grpo_clipped_after_the_step", "grpo.py",
           "            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), "
           "config.grad_clip)\n"
           "            steps.append(torch.stack([*step, norm]))\n"
           "            optimizer.step()\n",
           "            optimizer.step()\n"
           "            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), "
           "config.grad_clip)\n"
           "            steps.append(torch.stack([*step, norm]))\n",
           G + "test_gradients_are_clipped_before_the_step", "minChatGPT: clip before backward"),
    Mutant("grpo_ptx_dropped", "grpo.py", PTX, "                pass\n",
           WRITTEN + "[kept0-options7]",
           "logged, but never added: no living repository has the term"),
    Mutant("grpo_ptx_with_the_wrong_sign", "grpo.py", PTX, PTX.replace("(config", "(-config"),
           WRITTEN + "[kept0-options7]", "-"),
    Mutant("text_skipped_with_the_dropped_groups", "grpo.py",
           "if len(rows) == 0 and config.ptx_coef == 0:", "if len(rows) == 0:",
           G + "test_a_step_without_signal_still_learns_from_text", "-"),
    Mutant("dropped_groups_in_the_metrics", "grpo.py",
           "rows = rows[kept[rows] > 0]", "rows = rows[kept[rows] >= 0]",
           G + "test_metrics_are_those_of_the_kept_responses", "-"),
    Mutant("grpo_resume_forgets_the_optimiser", "grpo.py",
           'run.load_state(policy=policy, optimizer=optimizer)',
           'run.load_state(policy=policy)',
           G + "test_resume_is_exact", "-"),
    Mutant("logged_kl_with_the_wrong_sign", "evaluate.py",
           'seq_kl = ((batch["old_logp"] - batch["ref_logp"]) * mask).sum(1)',
           'seq_kl = ((batch["ref_logp"] - batch["old_logp"]) * mask).sum(1)',
           LOGGED, "rlhf-book: kl1 negated"),
    Mutant("no_signal_is_its_complement", "grpo.py",
           'no_signal=1 - has_signal(batch["score"], config.k).float().mean().item()',
           'no_signal=has_signal(batch["score"], config.k).float().mean().item()',
           LOGGED, "-"),
    Mutant("eos_rate_is_its_complement", "evaluate.py",
           'eos_rate=batch["finished"].float().mean().item()',
           'eos_rate=1 - batch["finished"].float().mean().item()',
           LOGGED, "-"),
    Mutant("kept_is_the_share_of_responses_with_a_reward", "grpo.py",
           'kept=batch["kept"].mean().item()', 'kept=(score > 0).float().mean().item()', LOGGED,
           "-"),
    Mutant("accuracy_is_that_of_the_sft_model", "evaluate.py",
           'metrics |= (with_se(name, after) | with_se(f"{name}_sft", before)',
           'metrics |= (with_se(name, before) | with_se(f"{name}_sft", after)',
           "test_evaluate.py::test_right_answers_of_made_up_samples", "-"),
    Mutant("negative_coefficients_accepted", "cli.py",
           "if bounds and not bounds[0](value):", "if False:",
           G + "test_bad_input_is_one_clear_line", "-"),
    Mutant("nan_accepted", "cli.py",
           "if kind is float and not math.isfinite(value):", "if False:",
           "test_dpo.py::test_bad_input_is_one_clear_line", "-"),
    Mutant("k3_without_effect", "grpo.py",
           'if config.kl_in == "reward" and asked:', "if False:",
           G + "test_bad_input_is_one_clear_line", "-"),
    Mutant("trace_of_a_group_without_signal", "trace.py",
           "    if not signal.any():\n", "    if False:\n",
           "test_trace.py::test_bad_input_is_one_clear_line", "-"),
    Mutant("trace_of_the_first_iteration", "trace.py",
           'range(min(2, config.iterations)), "grpo"', 'range(min(1, config.iterations)), "grpo"',
           "test_trace.py::test_grpo", "-"),
    Mutant("trace_forgets_the_pretraining_text", "trace.py",
           "    if config.ptx_coef > 0:\n", "    config.ptx_coef = 0.0\n    if False:\n",
           "test_trace.py::test_the_numbers_are_those_of_the_run", "-"),
    Mutant("sign_lost", "data/verifier.py",
           'return -value if re.search("[-−]", found[-1][0]) else value', "return value", NUMBER,
           "-"),
    Mutant("decimals_lost", "data/verifier.py",
           'value = Decimal(found[-1][1].replace(",", ""))',
           'value = Decimal(found[-1][1].replace(",", "").split(".")[0] or 0)', NUMBER, "-"),
    Mutant("answers_in_scientific_notation", "data/records.py",
           'answer=format(Decimal(str(answer)), "f")', "answer=str(answer)",
           G + "test_answer_records", "-"),
    Mutant("test_problems_in_training", "data/gsm8k.py",
           'held_out=Path(path).name == "test.jsonl"', "held_out=False",
           G + "test_gsm8k_adapter", "-"),
]

MUTANTS = MODEL + DATA + REWARD + PPO + DPO + GRPO

# an edit that does not run is not a bug that a test has found
CRASH = re.compile(r"^E +(Name|Import|ModuleNotFound|Syntax|Indentation|Attribute|Type"
                   r"|UnboundLocal)Error|^(Name|Import|Syntax|Attribute|Type)Error", re.MULTILINE)


def applied(mutant, source):
    """The source of mutant.file with the bug in it. ValueError if it no longer applies."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"no longer applies: its text is {source.count(mutant.old)} times in "
                         f"{mutant.file}")
    changed = source.replace(mutant.old, mutant.new)
    compile(changed, mutant.file, "exec")
    return changed


# processes that come from one which has imported torch: half of the time of a mutant is that import
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["numpy", "pytest", "tiktoken", "torch"])
# start() asks every child for its status, and a status can be read once: when the thread that waits
# for the child asks at the same moment, one of the two finds nothing and reports 255
STATUS = threading.Lock()


def run_pytest(folder, tests, output):
    """In a process of its own: the tests (ids below tests/) of folder, all they print into output.
    """
    import pytest
    os.chdir(folder)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider",
                              *(f"tests/{t}" for t in tests)])))


def pytest(folder, tests):
    """Exit status and output of the tests, run in folder. TimeoutError after TIMEOUT seconds."""
    output = folder / "output.txt"
    process = FORKS.Process(target=run_pytest, args=(folder, tests, output))
    with STATUS:
        process.start()
    if not wait([process.sentinel], TIMEOUT):
        process.kill()
        raise TimeoutError(f"not done after {TIMEOUT} seconds")
    with STATUS:
        return process.exitcode, output.read_text()


def verdict(mutant, folder):
    """"killed", "SURVIVED" or "ERROR: ..." of one mutant, in a copy that is clean before and after.

    pytest exits with 1 where a test failed, and with other numbers where it could not run them.
    """
    path = folder / mutant.file
    source = path.read_text()
    try:
        path.write_text(applied(mutant, source))
        status, output = pytest(folder, mutant.tests.split())
    except (ValueError, SyntaxError, TimeoutError) as error:
        return f"ERROR: {error}"
    finally:
        path.write_text(source)
    if status == 0:
        return "SURVIVED"
    if status != 1 or CRASH.search(output):
        return f"ERROR: pytest exits with {status}, or the edit crashes:\n{output[-3000:]}"
    return "killed"


def main(names):
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        sys.exit(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not names or m.name in names]
    # no .pyc: the file changes back and forth within a second, which its time stamp cannot tell
    os.environ |= dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    with tempfile.TemporaryDirectory() as scratch:
        copies = queue.Queue()
        for i in range(PROCESSES):
            copies.put(Path(scratch, str(i)))
            shutil.copytree(ROOT, Path(scratch, str(i)),
                            ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        # the copy as it is has to pass, or a failure below would say nothing
        tests = sorted({t for m in chosen for t in m.tests.split()})
        status, output = pytest(Path(scratch, "0"), tests)
        if status:
            sys.exit(f"the tests fail without any mutant:\n{output[-5000:]}")

        def run(mutant):
            folder, start = copies.get(), time.time()
            result = verdict(mutant, folder)
            copies.put(folder)
            print(f"{result}  {mutant.name}  {time.time() - start:.1f} s", flush=True)
            return result == "killed"

        with ThreadPoolExecutor(PROCESSES) as pool:
            killed = sum(pool.map(run, chosen))
    print(f"killed {killed}/{len(chosen)}")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
