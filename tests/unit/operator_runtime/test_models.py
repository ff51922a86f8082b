"""The TPModels that are known: the newest of what the watch brought and what a write answered."""

from support.api_objects import at, tpmodel
from tpmodel_operator.api import TPModel
from tpmodel_operator.models import Change, ModelStore
from tpmodel_operator.queue import Key
from tpmodel_operator.records import UnreadableModelError

M = Key("default", "m")


def known(store: ModelStore) -> TPModel:
    model = store.get(M)
    assert isinstance(model, TPModel)
    return model


def test_a_new_tpmodel_needs_a_pass():
    store = ModelStore()
    assert store.deliver(tpmodel()) == Change(M, spec=True)
    assert known(store).uid == "uid-of-m"


def test_the_watch_never_brings_back_what_is_older_than_our_own_write():
    store = ModelStore()
    store.deliver(tpmodel(version=1))
    store.wrote(tpmodel(version=5, status={"restarts": 1}))
    assert store.deliver(tpmodel(version=3, replicas=2)) is None
    assert known(store).status.restarts == 1


def test_the_echo_of_our_own_write_needs_no_pass():
    store = ModelStore()
    store.deliver(tpmodel(version=1))
    store.wrote(tpmodel(version=5))
    assert store.deliver(tpmodel(version=5)) is None
    assert store.deliver(tpmodel(version=6)) == Change(M, spec=False)


def test_the_watch_is_judged_by_what_it_brought_not_by_our_writes():
    store = ModelStore()
    store.deliver(tpmodel(version=1))
    store.wrote(tpmodel(version=5))
    assert store.versions() == {"uid-of-m": 1}


def test_a_deleted_tpmodel_is_forgotten():
    store = ModelStore()
    store.deliver(tpmodel())
    assert store.deliver(tpmodel(version=2), deleted=True) == Change(M, spec=True)
    assert store.get(M) is None
    assert len(store) == 0
    assert store.versions() == {}


def test_the_late_end_of_an_old_tpmodel_does_not_hide_the_new_one_of_its_name():
    store = ModelStore()
    store.deliver(tpmodel(uid="old", version=1))
    store.deliver(tpmodel(uid="new", version=9))
    assert known(store).uid == "new"
    store.deliver(tpmodel(uid="old", version=8), deleted=True)
    assert known(store).uid == "new"


def test_a_tpmodel_that_is_going_says_so():
    store = ModelStore()
    item = tpmodel()
    item["metadata"]["deletionTimestamp"] = at(1)
    store.deliver(item)
    assert known(store).deleting


def test_a_spec_that_cannot_be_read_is_known_as_such_until_it_can():
    store = ModelStore()
    assert store.deliver(tpmodel(version=1, newField=1)) is not None
    assert isinstance(store.get(M), UnreadableModelError)
    assert store.deliver(tpmodel(version=2)) is not None
    assert known(store).resource_version == "2"


def test_a_change_of_the_spec_is_told_from_others():
    store = ModelStore()
    store.deliver(tpmodel(version=1))
    changed = tpmodel(version=2)
    changed["metadata"]["generation"] = 2
    assert store.deliver(changed) == Change(M, spec=True)
