package nic

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Results of SR-IOV plugins here are made up after the documentation of the plugins: today's (k8snetworkplumbingwg, with
// and without the pciID of CNI 1.1), Intel's before it (0.3.1), and the original (0.2.0: the answer of its IPAM alone).
func TestPlanVFs(t *testing.T) {
	const bdf, second = "0000:01:10.0", "10000:81:02.1"
	port := func(name string, index int, at string, addrs ...string) Link {
		l := eth(name, index, addrs...)
		l.Kind, l.ParentBus, l.ParentDev = "device", "pci", at
		return l
	}
	old := func(version, text string) Attachment {
		return Attachment{Network: "sriov", IfName: "net1", Result: result(t, strings.Replace(text, "{", `{"cniVersion":"`+version+`",`, 1))}
	}
	given := func(a Attachment, device string) Attachment {
		a.Device = device
		return a
	}
	bridge := cni(t, "default", "eth0", `{"interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/n"}],"ips":[{"address":"10.1.0.5/24","gateway":"10.1.0.1","interface":1}],"routes":[{"dst":"0.0.0.0/0"}]}`)
	eth0 := eth("eth0", 2, "10.1.0.5/24").with(route("0.0.0.0/0", "10.1.0.1"))
	const eth0Line = "eth0@default 1500: 10.1.0.5/24; 0.0.0.0/0 via 10.1.0.1\n"

	withDriver := VF{BDF: bdf, PF: "enp1s0", Group: 15, MAC: MAC{2, 0, 0, 0, 1, 0}, VLAN: 100}
	detached := VF{BDF: bdf, PF: "enp1s0", Group: 15, MAC: MAC{2, 0, 0, 0, 1, 0}, VLAN: 100, Detached: true}
	tests := []struct {
		row
		vfs  []VF
		macs string // of the NICs with a VF
	}{
		{row{
			name: "today's, 1.0.0, netdevice, beside a veth", as: []Attachment{bridge, cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","mac":"02:00:5e:10:00:09","mtu":1500,"sandbox":"/n"}],"ips":[{"address":"192.0.2.10/24","interface":0}]}`)},
			links: []Link{eth0, port("net1", 9, bdf, "192.0.2.10/24")},
			want:  eth0Line + "net1@sriov 1500: 192.0.2.10/24; vf 0000:01:10.0",
		}, []VF{withDriver}, "02:00:5e:10:00:09"},
		{row{
			name: "today's, 1.1.0, netdevice: the link counts, also where its device is named", as: []Attachment{given(cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","mac":"02:00:5e:10:00:09","mtu":1500,"sandbox":"/n","pciID":"0000:01:10.0"}],"ips":[{"address":"192.0.2.10/24","interface":0}]}`), bdf)},
			links: []Link{port("net1", 9, bdf, "192.0.2.10/24")},
			want:  "net1@sriov 1500: 192.0.2.10/24; vf 0000:01:10.0",
		}, []VF{withDriver}, "02:00:5e:10:00:09"},
		{row{
			name: "the VF is the first network", as: []Attachment{cni(t, "sriov", "eth0", `{"interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"address":"192.0.2.10/24","gateway":"192.0.2.1","interface":0}],"routes":[{"dst":"0.0.0.0/0"}]}`), cni(t, "b", "eth1", `{"interfaces":[{"name":"eth1","sandbox":"/n"}]}`)},
			links: []Link{eth("eth1", 3, "10.1.0.5/24"), port("eth0", 9, bdf, "192.0.2.10/24").with(route("0.0.0.0/0", "192.0.2.1"))},
			want:  "eth0@sriov 1500: 192.0.2.10/24; 0.0.0.0/0 via 192.0.2.1; vf 0000:01:10.0\neth1@b 1500: 10.1.0.5/24",
		}, []VF{withDriver}, "02:00:5e:10:00:09"},
		{row{
			name: "today's, 1.1.0, with VFIO: all is the result's", as: []Attachment{bridge, cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","mac":"02:00:00:00:01:77","mtu":9000,"sandbox":"/n","pciID":"0000:01:10.0"}],"ips":[{"address":"192.0.2.10/24","gateway":"192.0.2.1","interface":0}],"routes":[{"dst":"198.51.100.0/24","gw":"192.0.2.1"}]}`)},
			links: []Link{eth0},
			want:  eth0Line + "net1@sriov 9000: 192.0.2.10/24; 198.51.100.0/24 via 192.0.2.1; vf 0000:01:10.0",
		}, []VF{detached}, "02:00:00:00:01:77"},
		{row{
			name: "today's, 1.0.0, with VFIO: the configuration's deviceID, and the MAC of the PF", as: []Attachment{bridge, given(cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","sandbox":"/n"}],"ips":[{"address":"192.0.2.10/24","interface":0}]}`), bdf)},
			links: []Link{eth0},
			want:  eth0Line + "net1@sriov 1500: 192.0.2.10/24; vf 0000:01:10.0",
			notes: []string{"MTU of 1500"},
		}, []VF{detached}, "02:00:00:00:01:00"},
		{row{
			name: "no addresses, and another PCI domain", as: []Attachment{given(cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","mtu":1500,"sandbox":"/n"}]}`), second)},
			want: "net1@sriov 1500:; vf 10000:81:02.1",
		}, []VF{{BDF: second, PF: "ens1f0", Index: 1, Group: 32, MAC: MAC{2, 0, 0, 0, 1, 1}, Detached: true}}, "02:00:00:00:01:01"},
		{row{
			name: "two VFs of one network each, one with VFIO; the order is CNI's", as: []Attachment{
				given(cni(t, "a", "net1", `{"interfaces":[{"name":"net1","mtu":1500,"sandbox":"/n"}]}`), second),
				cni(t, "b", "net2", `{"interfaces":[{"name":"net2","sandbox":"/n"}]}`),
			},
			links: []Link{port("net2", 9, bdf, "192.0.2.10/24")},
			want:  "net1@a 1500:; vf 10000:81:02.1\nnet2@b 1500: 192.0.2.10/24; vf 0000:01:10.0",
		}, []VF{withDriver, {BDF: second, Index: 1, MAC: MAC{2, 0, 0, 0, 1, 1}, Detached: true}}, "02:00:00:00:01:01 02:00:5e:10:00:09"},
		{row{
			name: "Intel's, 0.3.1, netdevice", as: []Attachment{old("0.3.1", `{"interfaces":[{"name":"net1","mac":"02:00:5e:10:00:09","sandbox":"/n"}],"ips":[{"version":"4","address":"192.0.2.10/24","gateway":"192.0.2.1","interface":0}],"routes":[{"dst":"198.51.100.0/24"}],"dns":{}}`)},
			links: []Link{port("net1", 9, bdf, "192.0.2.10/24")},
			want:  "net1@sriov 1500: 192.0.2.10/24; 198.51.100.0/24 via 192.0.2.1; vf 0000:01:10.0",
		}, []VF{withDriver}, "02:00:5e:10:00:09"},
		{row{
			name: "Intel's, 0.3.1, for DPDK: the interface's name, and the addresses of its IPAM", as: []Attachment{given(old("0.3.1", `{"interfaces":[{"name":"net1","sandbox":"/n"}],"ips":[{"version":"4","address":"192.0.2.10/24","interface":0}],"dns":{}}`), bdf)},
			want:  "net1@sriov 1500: 192.0.2.10/24; vf 0000:01:10.0",
			notes: []string{"MTU of 1500"},
		}, []VF{detached}, "02:00:00:00:01:00"},
		{row{
			name: "the original, 0.2.0, netdevice", as: []Attachment{old("0.2.0", `{"ip4":{"ip":"192.0.2.10/24","gateway":"192.0.2.1"}}`)},
			links: []Link{port("net1", 9, bdf, "192.0.2.10/24")},
			want:  "net1@sriov 1500: 192.0.2.10/24; vf 0000:01:10.0",
		}, []VF{withDriver}, "02:00:5e:10:00:09"},
		{row{
			name: "the original, 0.2.0, for DPDK, where the device is known", as: []Attachment{given(old("0.2.0", `{"ip4":{"ip":"192.0.2.10/24"}}`), bdf)},
			want:  "net1@sriov 1500: 192.0.2.10/24; vf 0000:01:10.0",
			notes: []string{"MTU of 1500"},
		}, []VF{detached}, "02:00:00:00:01:00"},
		{row{
			name: "Intel's first, for DPDK: it answers null, as is known of the device alone", as: []Attachment{bridge, {Network: "sriov", IfName: "net1", Device: bdf}},
			links: []Link{eth0},
			want:  eth0Line + "net1@sriov 1500:; vf 0000:01:10.0",
			notes: []string{"MTU of 1500"},
		}, []VF{detached}, "02:00:00:00:01:00"},
		{row{
			name: "Intel's first, for DPDK, as a cache has null", as: []Attachment{given(old("0.2.0", `{"dns":{}}`), bdf)},
			want:  "net1@sriov 1500:; vf 0000:01:10.0",
			notes: []string{"MTU of 1500"},
		}, []VF{detached}, "02:00:00:00:01:00"},
		{row{
			name: "by device info, with something that could not be used", as: []Attachment{{Network: "sriov", IfName: "net1", Device: bdf, DeviceType: "pci", DeviceNote: "x is no PCI address", Result: cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","mtu":1500,"sandbox":"/n"}]}`).Result}},
			want:  "net1@sriov 1500:; vf 0000:01:10.0",
			notes: []string{"x is no PCI address"},
		}, []VF{detached}, "02:00:00:00:01:00"},
		{row{
			name: "device info calls it vdpa", as: []Attachment{bridge, {Network: "sriov", IfName: "net1", Device: bdf, DeviceType: "vdpa"}},
			links: []Link{eth0}, err: `interface "net1" is of type "vdpa", as its device info says`,
		}, []VF{detached}, ""},
		{row{
			name: "device info calls it vhost-user", as: []Attachment{{Network: "fast", IfName: "net1", DeviceType: "vhost-user"}},
			links: []Link{port("net1", 9, bdf)}, err: `"vhost-user", as its device info says`,
		}, []VF{withDriver}, ""},
		{row{
			name: "a device that is not with VFIO, and in no namespace of the pod", as: []Attachment{given(cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","sandbox":"/n"}]}`), bdf)},
			links: []Link{eth0}, err: `names interface "net1" in the pod, but its namespace has no such link`,
		}, []VF{withDriver}, ""},
		{row{
			name: "a device without a MAC", as: []Attachment{given(cni(t, "sriov", "net1", `{"interfaces":[{"name":"net1","mtu":1500,"sandbox":"/n"}]}`), bdf)},
			err: "no Ethernet address",
		}, []VF{{BDF: bdf, Detached: true}}, ""},
		{row{
			name: "a name that is none", as: []Attachment{cni(t, "sriov", "", `{"interfaces":[{"name":"../net1","sandbox":"/n","pciID":"0000:01:10.0"}]}`)},
			links: []Link{eth0}, err: "no such link",
		}, []VF{detached}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			nics, notes, err := Plan(tt.as, Snapshot{Links: tt.links, VFs: tt.vfs})
			if tt.err != "" || err != nil {
				wantError(t, err, tt.err)
				return
			}
			if diff := cmp.Diff(lines(tt.want), lines(show(nics))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			var macs []string
			for _, n := range nics {
				if n.VF == nil {
					continue
				}
				macs = append(macs, n.MAC.String())
				for _, want := range tt.vfs {
					if want.BDF == n.VF.BDF && want != *n.VF {
						t.Errorf("VF %+v, want %+v", *n.VF, want)
					}
				}
			}
			if got := strings.Join(macs, " "); got != tt.macs {
				t.Errorf("MACs %s, want %s", got, tt.macs)
			}
			if len(notes) != len(tt.notes) {
				t.Fatalf("notes %q, want %q", notes, tt.notes)
			}
			for i, n := range notes {
				if !strings.Contains(n, tt.notes[i]) {
					t.Errorf("note %q, want %q", n, tt.notes[i])
				}
			}
		})
	}
}

func TestFunctions(t *testing.T) {
	link := Link{Name: "net1", ParentBus: "pci", ParentDev: "0000:01:10.0"}
	virtio := Link{Name: "ens3", ParentBus: "virtio", ParentDev: "virtio0"}
	as := []Attachment{
		{Device: "0000:01:10.0"},
		{Device: "10000:81:02.1"},
		{Device: "auxiliary.sf.1"},
		{Device: "../../../etc"},
		cni(t, "a", "net2", `{"interfaces":[{"name":"h","pciID":"0000:02:00.0"},{"name":"net2","sandbox":"/n","pciID":"0000:01:10.2"},{"name":"net3","sandbox":"/n","pciID":"x"}]}`),
	}
	// Of the host's interfaces none is the guest's.
	want := []string{"0000:01:10.0", "10000:81:02.1", "0000:01:10.2"}
	if diff := cmp.Diff(want, Functions(as, []Link{virtio, link})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
