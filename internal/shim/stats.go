package shim

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/proto"
)

// stats gives what managers show of a group: time, memory, processes. A few small files are read; one that is missing
// leaves its values zero.
func (c cgroup) stats() proto.Message {
	if c.unified() {
		return c.stats2()
	}
	return c.stats1()
}

func (c cgroup) stats1() *v1.Metrics {
	acct := func(file string) uint64 { return c.number("cpuacct/", file) }
	mem := func(file string) uint64 { return c.number("memory/", file) }
	stat := c.table("memory/", "memory.stat")
	return &v1.Metrics{
		CPU: &v1.CPUStat{Usage: &v1.CPUUsage{
			Total: acct("cpuacct.usage"), User: acct("cpuacct.usage_user"), Kernel: acct("cpuacct.usage_sys"),
		}, Throttling: &v1.Throttle{}},
		Memory: &v1.MemoryStat{
			Usage: &v1.MemoryEntry{
				Usage: mem("memory.usage_in_bytes"), Max: mem("memory.max_usage_in_bytes"), Limit: mem("memory.limit_in_bytes"), Failcnt: mem("memory.failcnt"),
			},
			Cache: stat["cache"], RSS: stat["rss"], MappedFile: stat["mapped_file"], PgFault: stat["pgfault"], PgMajFault: stat["pgmajfault"],
			TotalRSS: stat["total_rss"], TotalCache: stat["total_cache"], TotalInactiveFile: stat["total_inactive_file"],
			TotalActiveFile: stat["total_active_file"], TotalPgFault: stat["total_pgfault"], TotalPgMajFault: stat["total_pgmajfault"],
		},
		Pids: &v1.PidsStat{Current: c.number("pids/", "pids.current"), Limit: c.number("pids/", "pids.max")},
	}
}

func (c cgroup) stats2() *v2.Metrics {
	cpu, mem := c.table("", "cpu.stat"), c.table("", "memory.stat")
	return &v2.Metrics{
		CPU: &v2.CPUStat{
			UsageUsec: cpu["usage_usec"], UserUsec: cpu["user_usec"], SystemUsec: cpu["system_usec"],
			NrPeriods: cpu["nr_periods"], NrThrottled: cpu["nr_throttled"], ThrottledUsec: cpu["throttled_usec"],
		},
		Memory: &v2.MemoryStat{
			Usage: c.number("", "memory.current"), UsageLimit: c.number("", "memory.max"),
			Anon: mem["anon"], File: mem["file"], InactiveAnon: mem["inactive_anon"], ActiveAnon: mem["active_anon"],
			InactiveFile: mem["inactive_file"], ActiveFile: mem["active_file"], Pgfault: mem["pgfault"], Pgmajfault: mem["pgmajfault"],
		},
		Pids: &v2.PidsStat{Current: c.number("", "pids.current"), Limit: c.number("", "pids.max")},
	}
}

func (c cgroup) read(hierarchy, file string) []byte {
	b, _ := os.ReadFile(filepath.Join(c.root, hierarchy, c.path, file))
	return b
}

// number reads a file of one number; "max" is the largest.
func (c cgroup) number(hierarchy, file string) uint64 {
	s := strings.TrimSpace(string(c.read(hierarchy, file)))
	if s == "max" {
		return 1<<64 - 1
	}
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}

// table reads a file of lines NAME NUMBER.
func (c cgroup) table(hierarchy, file string) map[string]uint64 {
	all := map[string]uint64{}
	lines := bufio.NewScanner(bytes.NewReader(c.read(hierarchy, file)))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		all[name], _ = strconv.ParseUint(value, 10, 64)
	}
	return all
}
