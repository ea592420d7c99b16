"""The block pool: counts, reuse by hash, and which contents are given up first."""

import pytest

from sputnik.engine.blocks import BlockPool
from sputnik.engine.config import EngineConfig, cache_blocks
from sputnik.errors import ConfigError
from sputnik.model.config import ModelConfig


def filled(pool: BlockPool, *tokens: int) -> tuple[int, bytes]:
    """A held block registered under the digest of `tokens`."""
    block, digest = pool.allocate(), pool.digest(pool.root(b""), list(tokens))
    pool.register(block, digest)
    return block, digest


def test_every_block_is_handed_out_once_and_comes_back() -> None:
    pool = BlockPool(8, 4)
    blocks = [pool.allocate() for _ in range(8)]
    assert sorted(blocks) == list(range(8)) and pool.free == 0 and pool.used == 8
    for block in blocks:
        pool.release(block)
    assert pool.free == 8 and pool.used == 0


def test_an_empty_pool_and_a_double_free_are_loud() -> None:
    pool = BlockPool(1, 4)
    block = pool.allocate()
    with pytest.raises(RuntimeError, match="in use"):
        pool.allocate()
    pool.release(block)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.release(block)
    with pytest.raises(RuntimeError, match="nothing to share"):
        pool.share(block)
    with pytest.raises(ConfigError, match="at least one block"):
        BlockPool(0, 4)


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(2, 4)
    block = pool.share(pool.allocate())
    assert pool.holders(block) == 2
    pool.release(block)
    assert pool.used == 1
    pool.release(block)
    assert pool.used == 0


def test_a_free_block_keeps_its_contents_until_it_is_handed_out() -> None:
    pool = BlockPool(2, 2)
    block, digest = filled(pool, 1, 2)
    pool.release(block)
    assert pool.find(digest) == block and pool.free == 2
    assert pool.allocate() != block, "blocks without contents go first"
    assert pool.find(digest) == block
    assert pool.allocate() == block
    assert pool.find(digest) is None and pool.reusable == 0


def test_the_longest_unused_contents_are_given_up_first() -> None:
    pool = BlockPool(3, 1)
    held = [filled(pool, token) for token in (1, 2, 3)]
    for block, _ in held:
        pool.release(block)
    pool.release(pool.share(held[0][0]))  # used again: now the youngest
    assert [pool.allocate() for _ in range(3)] == [held[1][0], held[2][0], held[0][0]]


def test_equal_contents_are_offered_once() -> None:
    pool = BlockPool(2, 2)
    first, digest = filled(pool, 1, 2)
    second, again = filled(pool, 1, 2)
    assert digest == again and pool.find(digest) == first
    pool.release(second)
    assert pool.find(digest) == first and pool.reusable == 1


def test_a_digest_depends_on_tokens_history_salt_and_key() -> None:
    pool = BlockPool(1, 2, key=b"k")
    alice, bob = pool.root(b"alice"), pool.root(b"bob")
    first = pool.digest(alice, [1, 2])
    assert first == BlockPool(1, 2, key=b"k").digest(alice, [1, 2])
    others = {
        pool.digest(alice, [2, 1]),
        pool.digest(bob, [1, 2]),
        pool.digest(first, [1, 2]),
        BlockPool(1, 2, key=b"other").digest(alice, [1, 2]),
        BlockPool(1, 2).digest(alice, [1, 2]),
    }
    assert len(others | {first}) == 6
    assert pool.digest(alice, [1, 2**40]) != pool.digest(alice, [1, 0])


def test_forgetting_empties_the_table_and_loses_no_block() -> None:
    pool = BlockPool(3, 1)
    block, digest = filled(pool, 7)
    with pytest.raises(RuntimeError, match="in use"):
        pool.clear()
    pool.release(block)
    pool.clear()
    assert pool.find(digest) is None and pool.free == 3
    assert sorted(pool.allocate() for _ in range(3)) == [0, 1, 2]


def test_the_cache_of_a_small_machine_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, config = ModelConfig.preset("tiny"), EngineConfig(cache_bytes=1 << 30)
    block = config.block_size * (shape.num_hidden_layers + 1) * shape.cache_width * 4
    for free, blocks in ((None, 256 * 1024 // 16), (10**8, 10**8 // block), (block, 1)):
        monkeypatch.setattr("sputnik.engine.config.available_memory", lambda free=free: free)
        assert cache_blocks(shape, config, "fp32") == blocks
    monkeypatch.setattr("sputnik.engine.config.available_memory", lambda: block - 1)
    with pytest.raises(ConfigError, match="one block of 16 tokens takes"):
        cache_blocks(shape, config, "fp32")
