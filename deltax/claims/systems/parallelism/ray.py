"""Claims of ray: the paper's equations, parity with peers, and what it measures."""

from deltax import claim
from deltax.papers.systems.parallelism.ray import Node, Ref, ray, schedule


@claim
def what_is_lost_is_made_again_and_nothing_else():
    """After any object is lost, with any of those it was made from, every future gives what it gave, and only tasks
    whose objects are gone and asked for run again."""
    graph = ray()
    a, b = graph.remote(lambda: 3), graph.remote(lambda: 4)
    c = graph.remote(lambda x, y: x * y, a, b)
    d = graph.remote(lambda x, y: x + y, c, a)
    assert graph.get(d) == 15
    graph.lose(d)
    assert graph.get(d) == 15 and graph.runs == {a: 1, b: 1, c: 1, d: 2}
    graph.lose(a, c, d)
    assert graph.get(d) == 15 and graph.runs == {a: 2, b: 1, c: 2, d: 3}
    graph.lose(a, b)
    assert graph.get(d) == 15 and graph.runs[a] == 2


@claim
def an_actor_comes_back_by_its_chain():
    """An actor's calls happen in the order in which they were made, whichever is asked for first; lost, it replays
    them from its last checkpoint on."""
    for saves, replayed in ((False, 6), (True, 2)):
        graph = ray()
        actor = graph.actor(list)
        states, lengths = [actor.last], []
        for i in range(5):
            actor.call("append", i)
            states.append(actor.last)
            lengths.append(actor.call("__len__"))
            states.append(actor.last)
            if saves and i == 3:
                actor.checkpoint()
        assert graph.get(lengths[4]) == 5 and graph.get(lengths[1]) == 2
        before = sum(graph.runs[s] for s in states)
        graph.lose(*graph.objects)
        assert graph.get(lengths[4]) == 5
        assert graph.get(actor.last)[0] == [0, 1, 2, 3, 4]
        again = sum(graph.runs[s] for s in states) - before
        assert again == (len(states) if not saves else replayed)


@claim
def work_stays_where_it_was_asked_for_until_the_queue_is_long():
    """A task stays on its node while the queue is short, even where another node begins sooner; after that it goes
    where waiting and transfer together are least."""
    x, y = Ref(0), Ref(1)
    needs = [(x, 5.0), (y, 1.0)]
    nodes = [Node(3, frozenset({y})), Node(0), Node(2, frozenset({x}))]
    assert schedule(0, needs, nodes, longest=3, wait=1.0) == 0
    assert schedule(0, needs, nodes, longest=2, wait=1.0) == 2
    assert schedule(0, needs, nodes, longest=2, wait=9.0) == 1
    assert schedule(0, [], nodes, longest=2, wait=1.0) == 1
