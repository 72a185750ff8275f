# pyright: strict
"""The merge methods as functions: each is `merge.in_memory.merge` with the named options of one method of `METHODS`.

Structures, dtypes, gradients and errors are those of `merge.in_memory.merge`. Per-model options (`Each`) are a number, one
number per model, or a mapping from layers, paths or regular expressions to them. Other options (`Shared`) are a value, or such
a mapping. Options that only mergekit's recipes hold, without effect here, are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from dsee_jax.typing import Array
from merge.arguments import AnyOption, Each, Number, PerModel, Shared
from merge.in_memory import Model, merge


def rankmean(
    base: Model,
    models: Sequence[Model],
    *,
    unit: str = "layer",
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
    coefficients: Mapping[str, PerModel] | None = None,
) -> Model:
    """Return the mean of the models, weighted by the ranks of their changes unit by unit (RankMean, ACL 2024 Findings).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      unit: layer, tensor, or a regular expression with a group named unit; text.
      order: ascending: weights are ranks from the smallest change up; reversed: 1 over ranks from the largest down; one of
        ascending, reversed.
      ties: rank of equal changes: their mean rank, or by the order of the units; one of mean, order.
      coefficients: ``{unit: coefficients (models,)}`` in place of those from the ranks, from `rankmean_coefficients` or your
        own.
    """
    return merge(
        base,
        models,
        method="rankmean",
        unit=unit,
        order=order,
        ties=ties,
        coefficients=coefficients,
    )


def linear(
    base: Model | None,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    normalize: Shared[bool] = True,
) -> Model:
    """Return the weighted mean of the models (model soups, Wortsman et al. 2022, arXiv 2203.05482).

    Args:
      base: gives the structure and the types only; None: those of the first model.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      normalize: divide by the sum of the weights; true or false.
    """
    return merge(
        base,
        models,
        method="linear",
        weight=weight,
        normalize=normalize,
    )


def task_arithmetic(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    normalize: Shared[bool] = False,
    scale: Shared[Number] = 1.0,
) -> Model:
    """Return the base plus the weighted sum of the models' changes (Ilharco et al. 2023, arXiv 2212.04089).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
    """
    return merge(
        base,
        models,
        method="task_arithmetic",
        weight=weight,
        normalize=normalize,
        scale=scale,
    )


def passthrough(
    base: Model | None,
    models: Sequence[Model],
    *,
    scale: Each = 1.0,
) -> Model:
    """Return one model, unchanged or scaled.

    Args:
      base: gives the structure and the types only; None: those of the first model.
      models: the only model: one tree with the names and shapes of ``base``.
      scale: factor of every element; a number.
    """
    return merge(
        base,
        models,
        method="passthrough",
        scale=scale,
    )


def ties(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    normalize: Shared[bool] = True,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = False,
    trim: Shared[Literal["tensor", "global"]] = "tensor",
    vote: Shared[Literal["weighted", "unweighted"]] = "weighted",
    trim_ties: Shared[Literal["order", "keep"]] = "order",
) -> Model:
    """Keep the largest changes, elect signs, average the changes of that sign (TIES, Yadav et al. 2023, arXiv 2306.01708).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
      trim: trim the changes of each tensor, or of the model as a whole; one of tensor, global.
      vote: elect the sign of the sum of the weighted, or unweighted, changes; one of weighted, unweighted.
      trim_ties: among equal changes at the threshold, keep the first, or keep all as the authors' code does; one of order,
        keep.
    """
    return merge(
        base,
        models,
        method="ties",
        weight=weight,
        density=density,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
        trim=trim,
        vote=vote,
        trim_ties=trim_ties,
    )


def dare_ties(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    normalize: Shared[bool] = False,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = True,
    rescale_norm: Shared[Literal["l1", "inverse"]] = "l1",
    seed: Shared[int] = 0,
) -> Model:
    """Drop changes at random, elect signs, then sum (DARE, Yu et al. 2024, arXiv 2311.03099).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
      rescale_norm: l1: restore the sum of |change|; inverse: divide by the keep probability; one of l1, inverse.
      seed: seed of the random numbers; a whole number of at least 0.
    """
    return merge(
        base,
        models,
        method="dare_ties",
        weight=weight,
        density=density,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
        rescale_norm=rescale_norm,
        seed=seed,
    )


def della(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    epsilon: Each = 0.15,
    normalize: Shared[bool] = True,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = True,
    rescale_norm: Shared[Literal["l1", "inverse"]] = "l1",
    seed: Shared[int] = 0,
) -> Model:
    """Drop changes at random, small ones more often, elect signs, average (DELLA, Deep et al. 2024, arXiv 2406.11617).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      epsilon: keep probabilities go from density - epsilon to density + epsilon; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
      rescale_norm: l1: restore the sum of |change|; inverse: divide by the keep probability; one of l1, inverse.
      seed: seed of the random numbers; a whole number of at least 0.
    """
    return merge(
        base,
        models,
        method="della",
        weight=weight,
        density=density,
        epsilon=epsilon,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
        rescale_norm=rescale_norm,
        seed=seed,
    )


def breadcrumbs_ties(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    gamma: Each = 0.01,
    normalize: Shared[bool] = False,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = False,
) -> Model:
    """Drop the largest and smallest changes, elect signs, then sum (Davari & Belilovsky 2023, arXiv 2312.06795).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      gamma: fraction of the model's changes that is dropped for being the largest; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
    """
    return merge(
        base,
        models,
        method="breadcrumbs_ties",
        weight=weight,
        density=density,
        gamma=gamma,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
    )


def dare_linear(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    normalize: Shared[bool] = False,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = True,
    rescale_norm: Shared[Literal["l1", "inverse"]] = "l1",
    seed: Shared[int] = 0,
) -> Model:
    """Drop changes at random, then sum (DARE, Yu et al. 2024, arXiv 2311.03099).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
      rescale_norm: l1: restore the sum of |change|; inverse: divide by the keep probability; one of l1, inverse.
      seed: seed of the random numbers; a whole number of at least 0.
    """
    return merge(
        base,
        models,
        method="dare_linear",
        weight=weight,
        density=density,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
        rescale_norm=rescale_norm,
        seed=seed,
    )


def della_linear(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    epsilon: Each = 0.15,
    normalize: Shared[bool] = False,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = True,
    rescale_norm: Shared[Literal["l1", "inverse"]] = "l1",
    seed: Shared[int] = 0,
) -> Model:
    """Drop changes at random, small changes more often, then sum (DELLA, Deep et al. 2024, arXiv 2406.11617).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      epsilon: keep probabilities go from density - epsilon to density + epsilon; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
      rescale_norm: l1: restore the sum of |change|; inverse: divide by the keep probability; one of l1, inverse.
      seed: seed of the random numbers; a whole number of at least 0.
    """
    return merge(
        base,
        models,
        method="della_linear",
        weight=weight,
        density=density,
        epsilon=epsilon,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
        rescale_norm=rescale_norm,
        seed=seed,
    )


def breadcrumbs(
    base: Model,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    density: Each = 1.0,
    gamma: Each = 0.01,
    normalize: Shared[bool] = False,
    scale: Shared[Number] = 1.0,
    rescale: Shared[bool] = False,
) -> Model:
    """Drop the largest and smallest changes, then sum (Davari & Belilovsky 2023, arXiv 2312.06795).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      density: fraction of the model's changes that is kept; a number in [0, 1].
      gamma: fraction of the model's changes that is dropped for being the largest; a number in [0, 1].
      normalize: divide by the sum of the weights; true or false.
      scale: factor of the merged change; a number.
      rescale: scale the kept changes to make up for the dropped changes; true or false.
    """
    return merge(
        base,
        models,
        method="breadcrumbs",
        weight=weight,
        density=density,
        gamma=gamma,
        normalize=normalize,
        scale=scale,
        rescale=rescale,
    )


def slerp(
    base: Model,
    models: Sequence[Model],
    *,
    t: Shared[Number],
) -> Model:
    """Return the spherical interpolation from the base to one model (Shoemake 1985).

    Args:
      base: the model that all models were fine-tuned from.
      models: the only model: one tree with the names and shapes of ``base``.
      t: position on the arc: 0 is the base, 1 the model; a number.
    """
    return merge(
        base,
        models,
        method="slerp",
        t=t,
    )


def nuslerp(
    base: Model | None,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    nuslerp_flatten: Shared[bool] = True,
    nuslerp_row_wise: Shared[bool] = False,
) -> Model:
    """Return the spherical interpolation between two models, or between their changes if there is a base.

    Args:
      base: the model that all models were fine-tuned from; None: the models themselves are merged, not their changes.
      models: two trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      nuslerp_flatten: interpolate each tensor as one vector; true or false.
      nuslerp_row_wise: without nuslerp_flatten: interpolate columns, not rows; true or false.
    """
    return merge(
        base,
        models,
        method="nuslerp",
        weight=weight,
        nuslerp_flatten=nuslerp_flatten,
        nuslerp_row_wise=nuslerp_row_wise,
    )


def multislerp(
    base: Model | None,
    models: Sequence[Model],
    *,
    weight: Each = 1.0,
    normalize_weights: Shared[bool] = True,
    eps: Shared[Number] = 1e-08,
) -> Model:
    """Return the weighted mean direction of the models, or of their changes if there is a base, at their mean length.

    Args:
      base: the model that all models were fine-tuned from; None: the models themselves are merged, not their changes.
      models: trees with the names and shapes of ``base``.
      weight: weight of the model; a number.
      normalize_weights: divide by the sum of the weights; true or false.
      eps: added to lengths in denominators; a mean direction no longer than this counts as zero; a number of at least 0.
    """
    return merge(
        base,
        models,
        method="multislerp",
        weight=weight,
        normalize_weights=normalize_weights,
        eps=eps,
    )


def karcher(
    base: Model | None,
    models: Sequence[Model],
    *,
    max_iter: Shared[int] = 10,
    tol: Shared[Number] = 1e-05,
) -> Model:
    """Return the Karcher mean of the models on the sphere (Karcher 1977; arXiv 2603.04972).

    Args:
      base: gives the structure and the types only; None: those of the first model.
      models: trees with the names and shapes of ``base``.
      max_iter: maximum number of iterations; a whole number in [1, 10000].
      tol: stop when the mean moves by less than this angle; a number of at least 0.
    """
    return merge(
        base,
        models,
        method="karcher",
        max_iter=max_iter,
        tol=tol,
    )


def model_stock(
    base: Model,
    models: Sequence[Model],
    *,
    filter_wise: Shared[bool] = False,
) -> Model:
    """Interpolate from the base to the mean, by the angles between the changes (Jang et al. 2024, arXiv 2403.19522).

    Args:
      base: the model that all models were fine-tuned from.
      models: at least 2 trees with the names and shapes of ``base``.
      filter_wise: use one angle per row, not one per tensor; true or false.
    """
    return merge(
        base,
        models,
        method="model_stock",
        filter_wise=filter_wise,
    )


def sce(
    base: Model,
    models: Sequence[Model],
    *,
    select_topk: Shared[Number] = 1.0,
) -> Model:
    """Select elements by variance, weigh models by squared change, erase minority signs (Wan et al. 2024, arXiv 2408.07990).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      select_topk: fraction of the varying elements that is selected, the largest variance first; a number in [0, 1].
    """
    return merge(
        base,
        models,
        method="sce",
        select_topk=select_topk,
    )


def nearswap(
    base: Model,
    models: Sequence[Model],
    *,
    t: Shared[Number],
) -> Model:
    """Return the base plus the changes of one model, each limited to a magnitude of ``t``.

    Args:
      base: the model that all models were fine-tuned from.
      models: the only model: one tree with the names and shapes of ``base``.
      t: largest change that is taken in full; a number of at least 0.
    """
    return merge(
        base,
        models,
        method="nearswap",
        t=t,
    )


def arcee_fusion(
    base: Model,
    models: Sequence[Model],
) -> Model:
    """Take one model's most important changes, by magnitude and the divergence of their row (Arcee Fusion).

    Args:
      base: the model that all models were fine-tuned from.
      models: the only model: one tree with the names and shapes of ``base``.
    """
    return merge(
        base,
        models,
        method="arcee_fusion",
    )


def ram(
    base: Model,
    models: Sequence[Model],
    *,
    epsilon: Shared[Number] = 1e-05,
) -> Model:
    """Add up the changes of one model alone, average the changes of several; for sparse changes (arXiv 2601.13572).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      epsilon: a change up to this magnitude counts as none; a number of at least 0.
    """
    return merge(
        base,
        models,
        method="ram",
        epsilon=epsilon,
    )


def ramplus_tl(
    base: Model,
    models: Sequence[Model],
    *,
    r: Shared[Number] = 0.1,
    alpha: Shared[Number] = 0.2,
    epsilon: Shared[Number] = 1e-05,
) -> Model:
    """Return RAM with larger changes of one model alone, the more it shares with others (arXiv 2601.13572).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      r: strength of the factor of the changes of one model alone; a number.
      alpha: largest ratio of shared to lone changes that counts; a number.
      epsilon: a change up to this magnitude counts as none; a number of at least 0.
    """
    return merge(
        base,
        models,
        method="ramplus_tl",
        r=r,
        alpha=alpha,
        epsilon=epsilon,
    )


def fisher(
    base: Model | None,
    models: Sequence[Model],
    *,
    statistics: Sequence[object],
    weight: Each = 1.0,
    eps: Shared[Number] = 1e-06,
) -> Model:
    """Return the mean, weighted by each element's Fisher information (Matena & Raffel 2022, arXiv 2111.09832).

    Args:
      base: gives the structure and the types only; None: those of the first model.
      models: trees with the names and shapes of ``base``.
      statistics: per model a tree of mean squared gradients, with the model's structure and shapes.
      weight: weight of the model; a number.
      eps: added to the Fisher information of every parameter; a number above 0.
    """
    return merge(
        base,
        models,
        method="fisher",
        statistics=statistics,
        weight=weight,
        eps=eps,
    )


def regmean(
    base: Model | None,
    models: Sequence[Model],
    *,
    grams: Sequence[Mapping[str, Array]],
    alpha: Shared[Number] = 1.0,
) -> Model:
    """Return the least-squares fit to the outputs of every linear layer (RegMean, Jin et al. 2023, arXiv 2212.09849).

    Args:
      base: gives the structure and the types only; None: those of the first model.
      models: trees with the names and shapes of ``base``.
      grams: per model ``{name: (in, in)}``, the mean of ``X^T X`` over tokens, X the inputs of a matrix (out, in); tensors
        without get the plain mean.
      alpha: factor of the off-diagonal elements of the Gram matrices; a number in [0, 1].
    """
    return merge(
        base,
        models,
        method="regmean",
        grams=grams,
        alpha=alpha,
    )


def lines(
    base: Model,
    models: Sequence[Model],
    *,
    alpha: Shared[Number],
    beta: Shared[Number],
    over: str = "task_arithmetic",
    statistics: Sequence[object] | None = None,
    grams: Sequence[Mapping[str, Array]] | None = None,
    **options: AnyOption,
) -> Model:
    """Scale the merged change of another method by the depth of the layer (LiNeS, Wang et al. 2024, arXiv 2410.17146).

    Args:
      base: the model that all models were fine-tuned from.
      models: trees with the names and shapes of ``base``.
      alpha: factor of the change in the first layer and outside the layers; a number.
      beta: increase of the factor from the first layer to the last; a number.
      over: method that merges the changes; text.
      statistics: as in `fisher`, for that method.
      grams: as in `regmean`, for that method.
      **options: those of the method ``over``.
    """
    return merge(
        base,
        models,
        method="lines",
        alpha=alpha,
        beta=beta,
        over=over,
        statistics=statistics,
        grams=grams,
        **options,
    )
