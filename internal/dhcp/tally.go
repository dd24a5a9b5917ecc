package dhcp

import (
	"context"
	"log/slog"
	"sync"
)

// tally keeps the counters of a server, S. They belong to one struct, so that a reader sees all of one moment.
type tally[S any] struct {
	mu    sync.Mutex
	stats S
}

// Stats gives the counters as they are. It may be called at any time.
func (t *tally[S]) Stats() S {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stats
}

// count raises one of t.stats and gives its new value.
func (t *tally[S]) count(c *uint64) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	*c++
	return *c
}

// due says whether the n-th event of a kind is logged: the first, the second, the fourth and so on are, as a guest may
// cause any number of them. It is asked before a line is made, which costs memory.
func due(log *slog.Logger, n uint64) bool { return log != nil && n&(n-1) == 0 }

func report(log *slog.Logger, level slog.Level, n uint64, msg string, args ...any) {
	log.Log(context.Background(), level, msg, append(args, "times", n)...)
}
