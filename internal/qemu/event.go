package qemu

import (
	"encoding/json"
	"sync"
	"time"
)

// Event is something that happened in QEMU or in the guest. What comes from the guest is the guest's word.
type Event struct {
	Name string          // QAPI's name: SHUTDOWN, RESET, GUEST_PANICKED, POWERDOWN, STOP, NIC_RX_FILTER_CHANGED ...
	Data json.RawMessage // its members, unparsed; nil: none
	Time time.Time       // by the host's clock; zero: QEMU did not say
}

// maxQueued bounds the events that wait for a reader. A guest can cause some kinds as fast as it likes.
const maxQueued = 256

// eventQueue stands between the connection, which never waits, and a reader that may be slow. It holds at most
// maxQueued events and one more of each kept kind.
type eventQueue struct {
	out  chan Event
	wake chan struct{} // has room for one: something changed

	mu      sync.Mutex
	waiting []Event
	ended   bool
	dropped uint64
}

func newEventQueue() *eventQueue {
	return &eventQueue{out: make(chan Event), wake: make(chan struct{}, 1)}
}

// kept says whether events of that name must reach the reader: they tell how a guest ends or begins anew.
func kept(name string) bool {
	return name == "SHUTDOWN" || name == "RESET" || name == "GUEST_PANICKED"
}

// put queues an event. In a full queue a kept one takes the place of an earlier one of its name, or a place of its
// own; others are dropped.
func (q *eventQueue) put(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) >= maxQueued {
		q.dropped++
		if !kept(e.Name) {
			return
		}
		if i := q.last(e.Name); i >= 0 {
			q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
		} else {
			q.dropped-- // it finds room
		}
	}
	q.waiting = append(q.waiting, e)
	q.signal()
}

// last gives the index of the newest waiting event of that name, or -1.
func (q *eventQueue) last(name string) int {
	for i := len(q.waiting) - 1; i >= 0; i-- {
		if q.waiting[i].Name == name {
			return i
		}
	}
	return -1
}

// end says that no event comes any more.
func (q *eventQueue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = true
	q.signal()
}

func (q *eventQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// pump hands events to the reader until there are no more, or stop is closed.
func (q *eventQueue) pump(stop <-chan struct{}) {
	defer close(q.out)
	for {
		e, ok, ended := q.next()
		if ok {
			select {
			case q.out <- e:
			case <-stop:
				return
			}
			continue
		}
		if ended {
			return
		}
		select {
		case <-q.wake:
		case <-stop:
			return
		}
	}
}

func (q *eventQueue) next() (e Event, ok, ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == 0 {
		return Event{}, false, q.ended
	}
	e = q.waiting[0]
	q.waiting = q.waiting[1:]
	return e, true, false
}

func (q *eventQueue) droppedCount() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped
}
