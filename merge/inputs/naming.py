"""One spelling of tensor names for all models of a merge: that of the first model with a head, else the first model's."""

from collections.abc import Mapping, Sequence

from dsee_jax.ckpt import spelling
from merge.inputs import roles
from merge.inputs.lazy import Lazy
from merge.inputs.sources import Source


def spelled(tensors: Mapping[str, Lazy], like: Source) -> dict[str, Lazy]:
    """Return tensors under the names that a model has for them."""
    names = spelling.renamed(tensors, like.tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _speller(sources: Sequence[Source]) -> Source:
    """Return the first model with a head, whose body has its prefix; without one, the first model.

    A head beside a bare body is no model: transformers 4 refuses the file.
    """
    headed = (each for each in sources if any("pooler." not in name for name in roles.heads(each.tensors)))
    return next(headed, sources[0])


def unified(sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Return the models with the names of one, without the buffers that some lack, and notes on the changes.

    The names are those of the first model with a head, else of the first model. They differ in prefixes, wrappers and the
    params of norms, see `dsee_jax.ckpt.spelling`. A tensor that this model lacks keeps its name, with the prefix of the
    tensors beside it.
    """
    first, notes = _speller(sources), []
    named: list[Source] = []
    for source in sources:
        if source is first:
            named.append(source)
            continue
        names = spelling.renamed(source.tensors, first.tensors)
        moved = [(name, today) for name, today in names.items() if name != today]
        if moved:
            name, today = moved[0]
            count = f"{len(moved)} names are spelled otherwise: "
            notes.append(f"{source.reference}: {count * (len(moved) > 1)}{name} is {today} in {first.reference}")
        named.append(source._replace(tensors={names[name]: tensor for name, tensor in source.tensors.items()}))
    patterns = [
        {spelling.pattern(name) for name, tensor in source.tensors.items() if spelling.is_buffer(name, tensor.shape)}
        for source in named
    ]
    lacking = set().union(*patterns) - set.intersection(*patterns)
    if lacking:
        notes.append(f"buffers that not all models store are left out: {', '.join(sorted(lacking)[:4])}")
        named = [
            source._replace(
                tensors={
                    name: tensor
                    for name, tensor in source.tensors.items()
                    if spelling.pattern(name) not in lacking or not spelling.is_buffer(name, tensor.shape)
                }
            )
            for source in named
        ]
    return named, notes
