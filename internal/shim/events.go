package shim

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	eventTries   = 30 // a second apart: a containerd that restarts is back by then, and asks for what it has missed
	maxEvents    = 256
	eventTimeout = 5 * time.Second
)

// publisher forwards events to the manager, in order. One without an address forwards nothing: CRI-O asks instead.
type publisher struct {
	address, namespace string
	log                *slog.Logger

	queue  chan *types.Envelope
	ending atomic.Bool
	done   sync.WaitGroup
	conn   *ttrpc.Client
}

func newPublisher(address, namespace string, log *slog.Logger) *publisher {
	p := &publisher{address: strings.TrimPrefix(address, "unix://"), namespace: namespace, log: log, queue: make(chan *types.Envelope, maxEvents)}
	p.done.Go(p.run)
	return p
}

// send puts an event into the queue; one that is full has no reader worth waiting for.
func (p *publisher) send(topic string, event proto.Message) {
	if p.address == "" {
		return
	}
	any, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		p.log.Error("encode an event", "topic", topic, "err", err)
		return
	}
	select {
	case p.queue <- &types.Envelope{Timestamp: timestamppb.New(time.Now()), Namespace: p.namespace, Topic: topic, Event: any}:
	default:
		p.log.Warn("an event is lost: the manager does not take them", "topic", topic)
	}
}

// Close forwards what is in the queue, without insisting, and ends.
func (p *publisher) Close() error {
	p.ending.Store(true)
	close(p.queue)
	p.done.Wait()
	return nil
}

func (p *publisher) run() {
	for e := range p.queue {
		for try := 1; ; try++ {
			err := p.forward(e)
			if err == nil {
				break
			}
			if try == eventTries || p.ending.Load() {
				p.log.Warn("an event is lost", "topic", e.Topic, "err", err)
				break
			}
			time.Sleep(time.Second)
		}
	}
	if p.conn != nil {
		p.conn.Close()
	}
}

func (p *publisher) forward(e *types.Envelope) error {
	if p.conn == nil {
		conn, err := net.DialTimeout("unix", p.address, eventTimeout)
		if err != nil {
			return err
		}
		p.conn = ttrpc.NewClient(conn)
	}
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	_, err := events.NewTTRPCEventsClient(p.conn).Forward(ctx, &events.ForwardRequest{Envelope: e})
	if err != nil {
		p.conn.Close()
		p.conn = nil
	}
	return err
}
