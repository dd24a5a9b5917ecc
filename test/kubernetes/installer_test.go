package kubernetes

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
)

// deploy is the directory of manifests.
const deploy = "../../deploy"

// The installer's image, and the archive of it in the lab's directory.
const installerImage, installerTar = "localhost/virtlet-installer:1", "installer.tar"

// base gives the manifests of a cluster, for the image of the lab. There is no systemd here to restart containerd.
func (c *cluster) base() string {
	c.t.Helper()
	text := c.kubectl("kustomize", deploy+"/base")
	text = regexp.MustCompile(`(?m)^ +- --restart\n`).ReplaceAllString(text, "")
	return regexp.MustCompile(`image: .*virtlet-installer.*`).ReplaceAllString(text, "image: "+installerImage)
}

// The files of the installer on the node.
var installed = []string{"/usr/local/bin/virtlet", "/usr/local/bin/containerd-shim-virtlet-v2"}

const daemonSet = "daemonset/virtlet-installer"

// install makes the node one of VMs as users do: by a label and the manifests of deploy/base.
func (c *cluster) install() {
	c.t.Helper()
	// The installer asks the node's containerd what it makes of a configuration, where systemd's services are looked for.
	program, err := exec.LookPath("containerd")
	if err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile("/usr/local/bin/containerd", read(c.t, program), 0o755); err != nil {
		c.t.Fatal(err)
	}
	c.apply(c.base())
	c.kubectl("label", "node", nodeName, "virtlet.cloud/node=true")
	c.eventually("the installer has started", func() bool { return c.rolledOut() })
	for _, file := range installed {
		if _, err := os.Stat(file); err != nil {
			c.t.Error(err)
		}
	}
	c.stop("containerd")
	c.start("containerd")
	c.progress("the installer has made it a node of VMs")
}

// rolledOut tells whether the installer runs on the node.
func (c *cluster) rolledOut() bool {
	return c.kubectl("get", "-n", "virtlet-system", daemonSet, "-o", "jsonpath={.status.numberReady}") == "1"
}

// uninstall takes the manifests away, and the installer takes its files along.
func (c *cluster) uninstall() {
	c.t.Helper()
	c.kubectl("delete", "-n", "virtlet-system", daemonSet, "--cascade=foreground", "--timeout="+patience.String())
	c.kubectl("delete", "namespace/virtlet-system", "--timeout="+patience.String())
	for _, file := range installed {
		if _, err := os.Stat(file); err == nil {
			c.t.Errorf("%s is still there", file)
		}
	}
	if config := string(read(c.t, "/etc/containerd/config.toml")); strings.Contains(config, "runtimes.virtlet]") {
		c.t.Errorf("containerd's configuration still has the handler:\n%s", config)
	}
}

// samples: the API server takes them. The images are not here, and nothing of it is made.
func (c *cluster) samples() {
	c.t.Log(strings.TrimSpace(c.kubectl("apply", "--dry-run=server", "-n", "other", "-f", deploy+"/samples")))
}
