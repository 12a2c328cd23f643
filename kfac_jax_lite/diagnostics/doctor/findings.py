"""What ``doctor`` says: a finding, the text of several, and the words of each kind."""

import functools
import re
from typing import Any, NamedTuple

SEVERITIES = ("error", "warning", "notice")

# Message and advice by kind, or by kind and case; fields are numbers and words.
SAID = """
no_steps: No step has been taken: there is nothing to look at.
  try: Call doctor after some steps.
every_batch_skipped: All {skipped} batches so far were skipped, from the first on: a
    gradient or a statistic was NaN or infinite, and nothing has been learned.
  try: kfac.doctor with params= and batch= looks at the loss: labels that are no
    classes, NaN in the data, a logarithm or root of zero.
skipped_batches: {skipped} of {batches} batches were skipped because a gradient or a
    statistic was NaN or infinite.
  try: Look for NaN in the data and in the loss; a lower learning rate or a larger
    damping if they began in mid-run.
steps_taken_back: {retreats} steps in {all} ended so far uphill that they were taken
    back.
  try: A larger first damping, a lower learning rate or less momentum; larger batches if
    gradients are mostly noise.
learning_rate_without_effect: kl_clip has shortened the update in each of {observations}
    reports, to {least:.2g} to {largest:.2g} of its length: it sets how far to go, and
    the learning rate, or its schedule, changes nothing.
  try: Tune kl_clip in its place (steps grow with its root), or take a larger one, or a
    learning rate below {least:.2g} times this one.
trust_region_saturated: The trust region shortens the update to {trust:.2g} of its
    length {over}: kl_clip decides how far to go, the learning rate does not.
  try: A lower learning rate or a larger damping; a larger kl_clip if training is stable
    and slow.
trust_region_saturated/adaptive: The trust region shortens the update to {trust:.2g} of
    its length {over}: kl_clip decides how far to go, the learning rate does not.
  try: kl_clip=None: to an adaptive damping, steps that the trust region shortens look
    too short, and it falls without end.
failed_inversions: {failures} of {all} inversions failed; the last good inverse stayed
    in use.{none}
  try: A larger damping, or inverse="eigh", which bears singular factors.
old_inverse: The factors were refreshed about {refreshes_between:.0f} times since they
    were last inverted: their average has since been replaced, unused.
  try: A smaller inverse_interval, or a longer refresh interval: refreshes between
    inversions are mostly wasted.
no_gradient/waits: No gradient has reached this layer in the last {steps} steps.
  try: A head of a task without examples may wait so. Else freeze it on purpose
    (optax.masked), look for a dead or cut network above it, or mark every output that
    the loss depends on.
no_gradient: No gradient has reached this layer, or a part of it: its output factor is
    zero.
  try: Freeze it on purpose (optax.masked), or look for a dead or cut network above it.
never_refreshed: No statistics have arrived in {steps} steps: the gradient passes as it
    is.
  try: Pass statistics= of tagged.value_and_grad(…, opt_state=opt_state) to update at
    every step.
stale_factors: The statistics changed by {change:.0%} between the last two refreshes,
    yet they are kept for {interval} steps.
  try: A smaller threshold or max_interval of the interval rule.
refresh_forgotten: A refresh is due, with an interval of {interval} steps, and the last
    was {age} steps ago.
  try: Pass statistics= to update at every step; hand the current opt_state to
    value_and_grad.
interval_at_longest: {refreshes} refreshes have left the interval at {interval} steps,
    although they changed the statistics by {most:.1%} at most: changes of {longer:.1%}
    have lengthened an interval before. max_interval decides, not the rule.
  try: A larger max_interval if refreshes cost much; kfac.intervals.every({interval})
    does the same.
damping_at_bound/short: The adaptive damping stays at its lower bound, {damping:.2g},
    and steps still end short of the minimum along their direction (agreement
    {agreement:.2g}).
  try: A larger learning rate or kl_clip: no damping lengthens steps that they hold
    back; or a smaller minimum of kfac.damping.adaptive(), unless damping_too_small is
    found as well.
damping_at_bound/beyond: The adaptive damping stays at its upper bound, {damping:.2g},
    and steps still end beyond the minimum along their direction (agreement
    {agreement:.2g}).
  try: A lower learning rate or larger batches: gradients are mostly noise; or a larger
    maximum of kfac.damping.adaptive().
damping_at_bound/good: The Levenberg-Marquardt damping stays at its lower bound,
    {damping:.2g}, although the quadratic model predicts the loss well (reduction ratio
    {ratio:.2g}).
  try: A smaller minimum of kfac.damping.levenberg_marquardt() if training is slow,
    unless damping_too_small is found as well; else nothing.
damping_at_bound/poor: The Levenberg-Marquardt damping stays at its upper bound,
    {damping:.2g}, although the quadratic model predicts the loss badly (reduction ratio
    {ratio:.2g}).
  try: Larger batches for the model, a lower learning rate where it is fixed; or a
    larger maximum of kfac.damping.levenberg_marquardt().
damping_below_rounding: With damping {damping:.1g}, the matrices to be inverted have a
    condition number of {condition:.1e}: more than this precision resolves.
  try: {larger}
damping_too_small: With damping {damping:.1g}, directions of the least curvature are
    carried {amplification:.1e} times as far as typical ones: so small eigenvalues of an
    estimate are noise.
  try: {larger}
damping_too_large: Damping {damping:.1g} outweighs the largest curvature
    ({largest:.1g}): the step is the gradient, scaled.
  try: A smaller damping or kfac.damping.adaptive(). Where the loss is next to zero, the
    empirical Fisher matrix vanishes: fisher="mc" or "exact".
constant_inputs: The inputs hardly vary: their second moments have one direction only
    (effective rank {effective_rank:.4f} of {size}).
  try: Standardise the inputs; look for a dead layer below, or statistics taken with
    constant inputs or in evaluation mode.
dead_units: {share:.0%} of its units have never had a gradient.
  try: Look for dead ReLUs (a lower learning rate, another initialisation), masked or
    unused features.
dead_inputs: {share:.0%} of its inputs have always been zero.
  try: Look for dead ReLUs (a lower learning rate, another initialisation), masked or
    unused features.
unbatched_use: The table notes {found!r}: {meaning}
  try: Nothing, where that is meant (spectral normalisation, a network over parameters).
    Else let the examples' axis go through the layer: jax.vmap over the loss of one
    example, or inputs [batch, …].
diagonal_fallback: {share:.0%} of the parameters have only a diagonal; the largest is
    {first}.
  try: print(tagged) says why; kfac.tag_as, kfac.tag_dense and kfac.tag_conv tag by
    hand.
parameters_not_finite: The parameters are not finite: nothing can be learned from here
    on.
  try: Go back to a checkpoint; a lower learning rate or a larger damping.
steps_explode: The last update ({update:.2g}) is longer than the parameters
    ({parameters:.2g}); {held}.
  try: Set kl_clip, a lower learning rate, or a larger damping.
loss_not_finite: The loss of this batch is not finite.
  try: Look for NaN in the data and in the parameters.
loss_is_a_sum/doubled: With every example twice the loss is {ratio:.2f} times as large:
    it is a sum over the batch. Output factors are then too large by the square of the
    number of examples, and damping depends on the batch size.
  try: Return the mean over the examples.
loss_is_a_sum: The loss is {weight:.4g} times the mean negative log-likelihood of its
    {terms} rows: their sum. Output factors of the empirical Fisher matrix are too large
    by the square of that, steps with the others too long by it, and damping depends on
    the batch size.
  try: Return the mean over the examples.
loss_is_scaled: The loss is {weight:.3g} times the mean negative log-likelihood that
    kfac.{mark} names{said}: with fisher="exact" or "mc" the curvature is too small by
    that factor, with "empirical" it is too large by it.
  try: Pass weight={wanted:.3g} to kfac.{mark}, or scale the loss.
fisher_vanishes: The loss of this batch is {loss:.2g}: the examples are fitted, their
    gradients vanish and the empirical Fisher matrix with them. It no longer says
    anything about the curvature.
  try: tag(…, fisher="mc") or fisher="exact", which do not look at the labels.
too_few_rows: Factor {side} is {size} × {size} and has a rank of at most {held:.0f}: a
    refresh sees {rows} rows, the average holds {memory:.1f} refreshes.
  try: A larger batch or factor_decay, more frequent refreshes, less subsampling; else
    keep the damping well above zero.
other_inputs: This batch's inputs have {ratio:.2g} times the mean square of those that
    the factor averages (last refresh {age} steps ago).
  try: Take statistics in training mode and from the data that is trained on, with the
    same preprocessing; refresh more often.
other_gradients: This batch's output factor is {ratio:.2g} times the average one, which
    was refreshed {age} steps ago: it is of another phase of the training.
  try: A shorter refresh interval.
wrong_mark/probabilities: {said} holds probabilities: every entry is between 0 and 1,
    and the loss takes their logarithm. The mark wants what softmax or sigmoid is
    applied to, and samples its labels from softmax or sigmoid of what it marks.
  try: kfac.{mark}(logits), before softmax or sigmoid.
wrong_mark/other: {said} is that of a {likelihood} distribution: wanted a second
    derivative of the loss by it that is a multiple of the mark's Fisher information,
    seen {weight:.3g} times that of kfac.{likelihood}.
  try: kfac.{likelihood}, or the loss of a {mark} distribution.
wrong_mark/softmax: {said} is not used through a softmax: wanted rows of the loss's
    gradient that add up to 0, (p − y)/N, seen a share of {shift:.2g} of it along (1, …,
    1).
  try: Mark the logits that the softmax of the loss is applied to; kfac.bernoulli for
    outputs that are independent.
wrong_mark: {said} does not have the loss's second derivative: the nearest multiple of
    the mark's Fisher information is off by {error:.0%}. So it is meant for weighted
    rows, robust losses and policies.
  try: weight= of the mark for rows (or classes) that the loss weighs; else mark what
    the loss is a likelihood of.
labels_out_of_range: {bad} of {all} entries of {argument} are no class of the {count}
    that kfac.categorical marks: wanted 0 to {last}, seen {least} to {largest}. Such a
    loss is NaN.
  try: Labels that count from 0, as many logits as classes; a mask for padding, and a
    valid label there.
stored_averages: What goes into a layer is standardised by stored averages
    ({first}{state}), as batch norm does in evaluation mode: gradients and statistics
    are not those of training mode.
  try: Call the network in training mode inside the tagged loss (train=True,
    use_running_average=False); nothing, if the averages are frozen on purpose.
unused_key: The loss takes a PRNG key ({argument}) and does not use it: dropout and
    other noise are off, as in evaluation mode.
  try: Call the network in training mode inside the tagged loss (deterministic=False);
    leave the key out if nothing is random.
"""
ENTRY = re.compile(r"^(\S+): (.*?)\n  try: (.*?)(?=^\S|\Z)", re.M | re.S)
TEXTS: dict[str, list[str]] = {
    kind: [" ".join(part.split()) for part in parts]
    for kind, *parts in ENTRY.findall(SAID)
}


class Finding(NamedTuple):
    """Something that looks wrong.

    Attributes:
        severity: ``"error"`` (the run is not what you want), ``"warning"`` (it is
            likely to suffer) or ``"notice"`` (worth a look).
        kind: A stable name of the complaint, for programs.
        layer: The layer's name, or None for the whole run.
        message: What is wrong, in plain words.
        advice: What to try.
        numbers: What this rests on.
    """

    severity: str
    kind: str
    layer: str | None
    message: str
    advice: str
    numbers: dict[str, Any]

    @classmethod
    def of(
        cls,
        severity: str,
        text: str,
        layer: str | None = None,
        words: dict[str, Any] | None = None,
        /,
        **numbers: Any,
    ) -> "Finding":
        """What ``TEXTS`` says of a kind, its fields from ``numbers`` and ``words``."""
        fields = numbers | (words or {})
        message, advice = (part.format(**fields) for part in TEXTS[text])
        return cls(severity, text.split("/")[0], layer, message, advice, numbers)


error, warning, notice = (
    functools.partial(Finding.of, severity) for severity in SEVERITIES
)


class Findings(list[Finding]):
    """Findings, the gravest first; ``print`` them."""

    def __str__(self) -> str:
        """One paragraph per complaint, with the layers that share it."""
        groups: dict[str, list[Finding]] = {}
        for finding in self:
            groups.setdefault(finding.kind, []).append(finding)
        lines = []
        for first, *rest in groups.values():
            where = "" if first.layer is None else f" layer {first.layer}:"
            lines.append(f"[{first.severity}] {first.kind}:{where} {first.message}")
            if rest:
                others = ", ".join(str(finding.layer) for finding in rest)
                lines.append(f"  the same in: {others}")
            texts = (
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in first.numbers.items()
            )
            lines += [f"  try: {first.advice}", f"  from: {', '.join(texts)}"]
        return "\n".join(lines) or "No findings."
