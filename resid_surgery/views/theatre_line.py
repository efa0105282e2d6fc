"""One model, one forward at a time: who wants one waits in line.

Of one page's wishes of a kind, only the latest is carried out: the value at which a slider was let go, not
those that it passed while another forward ran. Long work (generating) is patient: it is told to stop when anybody
waits, and begins again when nobody does.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, final

T = TypeVar("T")


class SupersededError(Exception):
    """A later wish of the same page and kind came first, or the page was left."""


@final
class Line:
    """Runs work in one thread, in the order in which it was asked for; used from one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="theatre")
        self._turn = asyncio.Lock()
        self._latest: dict[tuple[Any, str], object] = {}
        self._hurried = 0

    async def ask(self, owner: Any, kind: str, work: Callable[[], T]) -> T:
        """Run work when its turn comes.

        Args:
            owner: whose. kind: of what; a later wish of that owner and kind takes its place. work: without arguments.

        Raises:
            SupersededError: a later one took its place. Whatever the work raises.
        """
        mine = self._name(owner, kind)
        self._hurried += 1
        try:
            await self._turn.acquire()
        finally:
            self._hurried -= 1
        try:
            self._require(owner, kind, mine)
            return await self._run(work)
        finally:
            self._turn.release()

    async def ask_patiently(
        self, owner: Any, kind: str, work: Callable[[Callable[[], bool]], T], *, pause: float = 0.0
    ) -> T:
        """Run long work while nobody waits.

        Args:
            owner, kind: as for `ask`. pause: seconds before it asks for a turn.
            work: is given a function that says whether to stop now; it then begins again.

        Raises:
            SupersededError: a later one took its place, or it was dropped. Whatever the work raises.
        """
        mine = self._name(owner, kind)
        await asyncio.sleep(pause)
        while True:
            async with self._turn:
                self._require(owner, kind, mine)
                stopped = False

                def stop() -> bool:
                    nonlocal stopped
                    stopped = stopped or self._hurried > 0 or self._latest.get((owner, kind)) is not mine
                    return stopped

                made = await self._run(lambda: work(stop))
            self._require(owner, kind, mine)
            if not stopped:
                return made

    def drop(self, owner: Any, kind: str | None = None) -> None:
        """Give up an owner's wishes, of one kind or all."""
        for key in [one for one in self._latest if one[0] == owner and kind in (None, one[1])]:
            del self._latest[key]

    def close(self) -> None:
        """Take no more work."""
        self._latest.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _name(self, owner: Any, kind: str) -> object:
        mine = self._latest[owner, kind] = object()
        return mine

    def _require(self, owner: Any, kind: str, mine: object) -> None:
        if self._latest.get((owner, kind)) is not mine:
            raise SupersededError(f"a later {kind} came first")

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
