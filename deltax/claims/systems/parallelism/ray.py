"""Claims of ray: the paper's equations, parity with peers, and what it measures."""

from deltax import claim
from deltax.papers.systems.parallelism.ray import Node, Ref, ray, schedule


@claim
def what_is_lost_is_made_again_and_nothing_else():
    """In a graph of four tasks, after three losses, every future has the same value, and only tasks with lost and
    requested objects run again.
    """
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
    """Calls of an actor run in the order of their creation; after a loss, it replays 6 of 6 calls, or 2 since a
    checkpoint.
    """
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
    """On three nodes, a task stays local with a queue of at most `longest`; otherwise it goes to the node with the
    least waiting and transfer.
    """
    x, y = Ref(0), Ref(1)
    needs = [(x, 5.0), (y, 1.0)]
    nodes = [Node(3, frozenset({y})), Node(0), Node(2, frozenset({x}))]
    assert schedule(0, needs, nodes, longest=3, wait=1.0) == 0
    assert schedule(0, needs, nodes, longest=2, wait=1.0) == 2
    assert schedule(0, needs, nodes, longest=2, wait=9.0) == 1
    assert schedule(0, [], nodes, longest=2, wait=1.0) == 1
