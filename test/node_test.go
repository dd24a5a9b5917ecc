package test

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
)

// node is a machine of its own as far as a script can tell: new network and mount namespaces, which live as long as one
// process in them reads from us.
type node struct {
	holder *exec.Cmd
	stdin  io.Closer
	work   string
}

// prepare runs inside a new node: $1 is where the plugins are, $2 the script's folder. /opt hides the machine's own
// plugins, and theirs may be there, so they are bound to a place that stays in sight.
const prepare = `set -e
mkdir "$2/.cni"
mount --bind "$1" "$2/.cni"
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=0755 tmpfs /opt
mkdir -p /run/netns /opt/cni
ln -s "$2/.cni" /opt/cni/bin
[ ! -d /etc/cni ] || mount -t tmpfs tmpfs /etc/cni
ip link set lo up
echo ready
exec cat`

func newNode(work, plugins string) (*node, error) {
	n := &node{holder: exec.Command("/bin/sh", "-c", prepare, "node", plugins, work), work: work}
	n.holder.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	n.holder.Stderr = os.Stderr
	stdin, err := n.holder.StdinPipe()
	if err != nil {
		return nil, err
	}
	n.stdin = stdin
	stdout, err := n.holder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.holder.Start(); err != nil {
		return nil, err
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		stdin.Close()
		return nil, fmt.Errorf("prepare a node: %q, %w", line, err)
	}
	return n, nil
}

func (n *node) pid() int { return n.holder.Process.Pid }

// end removes the script's VMs, reports what is left on the node, and takes the node away.
func (n *node) end(t testing.TB, e *testscript.Env) {
	defer func() {
		n.stdin.Close()
		n.holder.Wait()
	}()
	run := func(name string, args ...string) string {
		cmd := exec.Command(filepath.Join(strings.Split(e.Getenv("PATH"), ":")[0], name), args...)
		cmd.Env, cmd.Dir = e.Vars, n.work
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s %q: %v: %s", name, args, err, out)
		}
		return string(out)
	}
	for _, name := range strings.Fields(run("virtlet", "ps", "-q")) {
		run("virtlet", "rm", "-f", name)
	}
	left := n.files()
	bridges := links(run("node", "ip", "-br", "link", "show", "type", "bridge")) // plugins keep theirs
	for _, l := range links(run("node", "ip", "-br", "link")) {
		if l != "lo" && !slices.Contains(bridges, l) {
			left = append(left, "link "+l)
		}
	}
	for line := range strings.Lines(run("node", "nft", "list", "ruleset")) {
		if ofOneVM.MatchString(line) {
			left = append(left, "rule "+strings.TrimSpace(line))
		}
	}
	for _, pid := range n.processes() {
		command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left = append(left, "process "+strings.ReplaceAll(string(command), "\x00", " "))
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// ofOneVM matches rules that the plugins make for one VM; their tables and chains stay.
var ofOneVM = regexp.MustCompile(`dnat to|\bmasquerade\b|addr (10|198)\.[0-9.]+ .*accept`)

// links gives the names in what `ip -br link` printed: NAME or NAME@PEER, then more.
func links(list string) (names []string) {
	for line := range strings.Lines(list) {
		name, _, _ := strings.Cut(strings.Fields(line)[0], "@")
		names = append(names, name)
	}
	return names
}

// files gives what is left in the script's folders and on the node's /run, named namespaces included.
func (n *node) files() []string {
	var all []string
	st := store(n.work)
	for _, dir := range []string{st.Run, st.Data, fmt.Sprintf("/proc/%d/root/run", n.pid())} {
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() && !keptByPlugins(path) {
				all = append(all, "file "+path)
			}
			return nil
		})
	}
	return all
}

// keptByPlugins says whether a file is host-local's memory of the last address, or a lock of it or of iptables.
func keptByPlugins(path string) bool {
	base := filepath.Base(path)
	return strings.HasPrefix(base, "last_reserved_ip") || base == "xtables.lock" || base == "lock" && strings.Contains(path, "ipam")
}

// processes gives those that live on the node, without the one that holds it.
func (n *node) processes() []int {
	of := func(pid string) string { l, _ := os.Readlink("/proc/" + pid + "/ns/mnt"); return l }
	here := of(strconv.Itoa(n.pid()))
	all, _ := filepath.Glob("/proc/[0-9]*")
	var pids []int
	for _, p := range all {
		pid, _ := strconv.Atoi(filepath.Base(p))
		if pid != n.pid() && of(filepath.Base(p)) == here {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// onPath are the programs that scripts find first.
var onPath = map[string]string{
	"node":       `exec nsenter --target "$NODE" --net --mount -- sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"`,
	"virtlet":    `exec node "$VIRTLET_BIN" --run-dir "$WORK/run" --data-dir "$WORK/data" "$@"`,
	"withoutbpf": withoutBPF + `=1 exec "$TEST_BIN" "$@"`,
	"exits": `want=$1; shift
"$@"; got=$?
[ $got = "$want" ] || { echo "exit code $got, not $want" >&2; exit 1; }`,
}

// programs makes the directory of what scripts call. The binary is what VIRTLET_BIN names, or is built.
func programs(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	for name, body := range onPath {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	testnet.Virtlet(t, filepath.Join(bin, "real"))
	return bin
}

// disks makes the guests that scripts use.
func disks(e *testscript.Env) error {
	for variable, content := range map[string][]byte{"IDLE": nil, "ECHO": echo()} {
		path := filepath.Join(e.WorkDir, strings.ToLower(variable)+".raw")
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
		if err := os.Truncate(path, 1<<20); err != nil {
			return err
		}
		e.Setenv(variable, path)
	}
	return nil
}

// echo is a boot sector: it says "ready" on the first serial port (0x3f8, a 16550), echoes what comes in there, and
// powers off (ACPI, PM1a registers at 0x600 as SeaBIOS sets them up on q35) at the letter q or the power button.
func echo() []byte {
	code := []byte{
		0xfa, 0xfc, // cli; cld
		0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
		0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, // out 0x602, 0x100: PM1a enable, the power button
		0xbe, 0x41, 0x7c, // mov si, text
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xac, 0x84, 0xc0, 0x74, 0x03, // say: lodsb; test al, al; jz listen
		0xee, 0xeb, 0xf8, // out dx, al; jmp say
		0xba, 0x00, 0x06, 0xed, // listen: in ax, 0x600: PM1a status
		0xf6, 0xc4, 0x01, 0x75, 0x13, // test ah, 1; jnz off: the power button was pressed
		0xba, 0xfd, 0x03, 0xec, // in al, 0x3fd: line status
		0xa8, 0x01, 0x74, 0xef, // test al, 1; jz listen: nothing came
		0xba, 0xf8, 0x03, 0xec, // in al, 0x3f8
		0x3c, 'q', 0x74, 0x03, // cmp al, 'q'; je off
		0xee, 0xeb, 0xe4, // out dx, al; jmp listen
		0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, // off: out 0x604, 0x2000: PM1a control, sleep type 0, enable
	}
	code = append(code, 0xf4, 0xeb, 0xfd)   // hlt; jmp to it
	code = append(code, "ready\r\n\x00"...) // text
	sector := make([]byte, 512)
	copy(sector, code)
	copy(sector[510:], []byte{0x55, 0xaa})
	return sector
}
